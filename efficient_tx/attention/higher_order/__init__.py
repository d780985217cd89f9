"""Attention to pairs of tokens."""
