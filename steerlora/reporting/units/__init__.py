"""The report of an experiment on sparse units beside a model's layers."""
