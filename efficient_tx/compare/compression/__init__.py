"""Compression of one trained model by all methods, in the same bytes."""
