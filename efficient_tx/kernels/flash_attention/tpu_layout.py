"""Where a TPU has the numbers of a block: tokens last in main memory, one number a row in all lanes on the chip."""

import math

import jax
import jax.numpy as jnp

LANES = 128


def by_head(x: jax.Array) -> jax.Array:
    """`[batch, length, heads, dim]` as `[batch, heads, dim, length]`."""
    return x.transpose(0, 2, 3, 1)


def by_token(x: jax.Array) -> jax.Array:
    """`[batch, heads, dim, length]` as `[batch, length, heads, dim]`."""
    return x.transpose(0, 3, 1, 2)


def as_row(x: jax.Array) -> jax.Array:
    """`[size, 1]`, or one number in all lanes, as `[1, size]`."""
    return jnp.broadcast_to(x, (x.shape[0], LANES)).T[:1]


def across(x: jax.Array, width: int) -> jax.Array:
    """One number a row, in all lanes of `[size, 128]`, as `[size, width]`: without moving any between lanes."""
    return jnp.tile(x, (1, math.ceil(width / LANES)))[:, :width]
