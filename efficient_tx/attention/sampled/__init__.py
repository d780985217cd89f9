"""Attention to few keys that are drawn or chosen among all."""
