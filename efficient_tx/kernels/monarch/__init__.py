"""monarch: two block-diagonal products with a fixed permutation between them."""

from collections.abc import Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.kernels.monarch import reference
from efficient_tx.kernels.op import Op

OP = Op("monarch", ("pallas_tpu", "pallas_gpu", "xla", "reference"))

# For inputs with fewer numbers the plain formula is as fast on a CPU and compiles faster.
SMALL = 2**18


def monarch(
    x: jax.Array, w1: jax.Array, w2: jax.Array, *, implementation: str | None = None, interpret: Any = False,
    block_sizes: Hashable | None = None,
) -> jax.Array:  # fmt: skip
    """x times the Monarch matrix with the factors w1 and w2 (Dao et al. 2022, arXiv 2204.00595).

    hidden[k, q] = Σ_p x[k, p] w1[k, q, p], read as [r, l] with l fastest; y[s, l] = Σ_r hidden[r, l] w2[l, s, r].

    Args:
      x: `[..., k·p]`.
      w1: `[k, q, p]`, one q × p block per input block.
      w2: `[l, s, r]` with l·r = k·q, one s × r block per output group.
      implementation: "reference" (the plain formula, differentiable in both modes), "xla" (chunks of tokens),
        "pallas_tpu", "pallas_gpu" (the last three in reverse mode only), or None: on a CPU the reference for inputs
        with fewer than 2¹⁸ numbers, else on every platform the best one that supports the arguments.
      interpret: what the `interpret` of a Pallas kernel's call shall be.
      block_sizes: the `BlockSizes` of the named Pallas implementation; None uses its own.

    Returns:
      `[..., s·l]`, l fastest, in the promoted dtype. Products of float32 are whole ones on every platform.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    check_shapes(x, w1, w2)
    dtype = jnp.result_type(x, w1, w2)
    tokens = x.reshape(-1, x.shape[-1])
    arrays = [array.astype(dtype) for array in (tokens, w1, w2)]
    call = partial(OP, implementation, None, interpret=interpret, sizes=block_sizes)
    if implementation is None and x.size < SMALL and not interpret and block_sizes is None:
        out = jax.lax.platform_dependent(*arrays, cpu=partial(reference.forward, None), default=call)
    else:
        out = call(*arrays)
    return out.reshape(*x.shape[:-1], out.shape[-1])


def check_shapes(x: jax.Array, w1: jax.Array, w2: jax.Array) -> None:
    """Raises ValueError, one line, for the first shape that does not fit."""
    if w1.ndim != 3 or w2.ndim != 3:
        raise ValueError(f"w1 and w2 have shapes {w1.shape} and {w2.shape}: pass [k, q, p] and [l, s, r]")
    (k, q, p), (l, _, r) = w1.shape, w2.shape
    if k * q != l * r:
        raise ValueError(f"w1 has shape {w1.shape}, w2 {w2.shape}: k·q = {k * q} and l·r = {l * r} must be equal")
    if not x.ndim or x.shape[-1] != k * p:
        raise ValueError(f"x has shape {x.shape}: with w1 {w1.shape} its last axis must be k·p = {k * p}")
