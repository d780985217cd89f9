"""Runs many methods under many seeds and settings: `python -m efficient_tx.sweep --help`."""
