"""Attention to a block and to samples on GPUs: the kernels of block_attention, as in regrouped.py."""

from efficient_tx.kernels.block_attention import pallas_gpu
from efficient_tx.kernels.sampled_block_attention.regrouped import through

unsupported, sizes, forward, backward = through(pallas_gpu)
