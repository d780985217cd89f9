"""Measures the variants side by side: `python -m efficient_tx.compare attention --help`."""
