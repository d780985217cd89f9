"""Attention as a product of features of queries and keys: a sum over the keys, linear in the length."""
