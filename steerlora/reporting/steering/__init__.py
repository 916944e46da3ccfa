"""The report on concepts that are steered."""
