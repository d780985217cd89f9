"""The token mixers side by side."""
