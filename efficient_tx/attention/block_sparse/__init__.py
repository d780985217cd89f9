"""Attention with a sparsity pattern of blocks: local, global, strided, random."""
