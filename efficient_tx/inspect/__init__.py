"""The command that looks inside a trained run: python -m efficient_tx.inspect."""
