"""Attention to a block and to samples on TPUs: the kernels of block_attention, as in regrouped.py."""

from functools import partial
from typing import Any

from efficient_tx.kernels.block_attention import pallas_tpu as listed
from efficient_tx.kernels.sampled_block_attention import regrouped
from efficient_tx.kernels.sampled_block_attention.options import Sizes

unsupported = partial(regrouped.unsupported, listed)


def sizes(options: Sizes, *operands: Any) -> None:
    """They are those of block_attention."""


def forward(options: Sizes, sizes: None, *operands: Any, interpret: Any = False) -> tuple:
    """Output and log-sum-exp; see `sampled_block_attention`."""
    return regrouped.forward(listed, options, *operands, interpret=interpret), None


def backward(
    options: Sizes, sizes: None, operands: tuple, outputs: tuple, saved: None, cotangents: tuple,
    *, interpret: Any = False,
) -> tuple:  # fmt: skip
    """Cotangents of q, k and v, and None for the choice."""
    return *regrouped.backward(listed, options, operands, outputs, cotangents, interpret=interpret), None
