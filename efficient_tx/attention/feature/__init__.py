"""Attention with weights that are inner products of features of queries and keys: linear in the length."""
