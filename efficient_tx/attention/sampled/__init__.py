"""Attention to a few keys, sampled or selected from all keys."""
