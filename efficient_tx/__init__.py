"""Efficient transformers in JAX: attention variants and structured weights in one shared transformer."""
