"""Compares runs in one page or table: `python -m efficient_tx.report --help`."""
