"""Bit planes: whole numbers of a few bits, eight of them to a byte in each plane."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames="bits")
def to_planes(codes: jax.Array, bits: int) -> jax.Array:
    """Packs whole numbers.

    Args:
      codes: uint8 `[n, m]`, each below 2^bits.
      bits: from 1 to 8.

    Returns:
      uint8 `[bits, ⌈n / 8⌉, m]`; with r such rows, bit p of row i in plane b is bit b of number i + p r.
    """
    eight = jnp.pad(codes, [(0, -len(codes) % 8), (0, 0)]).reshape(8, -1, codes.shape[1])
    place = jnp.arange(8, dtype=jnp.uint8)[:, None, None]
    return jnp.stack([jnp.sum((eight >> bit & 1) << place, axis=0, dtype=jnp.uint8) for bit in range(bits)])


@partial(jax.jit, static_argnames="n")
def from_planes(planes: jax.Array, n: int) -> jax.Array:
    """The first n numbers of every column, uint8 `[n, m]`: undoes `to_planes`."""
    bits, _, m = planes.shape
    eight = [sum((planes[bit] >> place & 1) << bit for bit in range(bits)) for place in range(8)]
    return jnp.stack(eight).reshape(-1, m)[:n]
