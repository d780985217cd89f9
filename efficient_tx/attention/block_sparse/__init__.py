"""Attention to the keys of a fixed pattern of blocks: near, global, strided, random."""
