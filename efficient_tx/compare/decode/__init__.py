"""Decoding with the causal token mixers, side by side."""
