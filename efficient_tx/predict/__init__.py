"""Ranks methods from the first steps of their runs: `python -m efficient_tx.predict --help`."""
