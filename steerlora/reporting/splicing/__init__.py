"""The report of an experiment on SAEs in place of streams: shares of a gap, claims, a figure."""
