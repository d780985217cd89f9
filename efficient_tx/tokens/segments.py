"""Means over segments of a sequence or cells of a grid: landmarks without sampling and without parameters."""

import math

import jax
import jax.numpy as jnp

from efficient_tx.tokens.mask import bool_mask


def segment_means(x: jax.Array, mask: jax.Array | None, count: int) -> tuple[jax.Array, jax.Array]:
    """Splits the n real tokens of each example into `count` segments of almost equal size and averages each segment.

    The real token of rank i is in segment ⌊i · count / n⌋, so padding at any place changes nothing. With fewer real
    tokens than segments, each token is its own segment and the other segments are empty.

    Args:
      x: `[batch, length, ...]`, any floating dtype.
      mask: bool `[batch, length]`, True for real tokens; None means all are.
      count: number of segments, at least 1.

    Returns:
      Means `[batch, count, ...]`, float32 at least, zero for an empty segment; and bool `[batch, count]`, False for an
      empty segment. Time and memory are linear in the length.
    """
    batch, length = x.shape[:2]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mask = jnp.ones((batch, length), bool) if mask is None else bool_mask(mask)

    def one(x, mask):
        starts = segment_starts(mask.sum(), count)
        rank = jnp.maximum(jnp.cumsum(mask) - 1, 0)
        # Padding joins the segment of the token before it, as zero, to keep the indices sorted.
        segment = jnp.searchsorted(starts[1:-1], rank, side="right")
        sums = jax.ops.segment_sum(jnp.where(mask[:, None], x, 0), segment, count, indices_are_sorted=True)
        size = jnp.diff(starts)
        return sums / jnp.maximum(size, 1)[:, None], size > 0

    means, valid = jax.vmap(one)(x.reshape(batch, length, math.prod(x.shape[2:])), mask)
    return means.reshape(batch, count, *x.shape[2:]), valid


def segment_starts(n: jax.Array, count: int) -> jax.Array:
    """⌈s · n / count⌉ for s = 0 … count, int32 `[count + 1]`: the starts of the segments of n tokens; the last is n.

    `n` is a scalar and may be traced. The product n · count is not formed: it would overflow for long sequences.
    """
    s = jnp.arange(count + 1)
    return s * (n // count) - (-(s * (n % count)) // count)


def grid_means(x: jax.Array, mask: jax.Array | None, count: int) -> tuple[jax.Array, jax.Array]:
    """Splits the n real tokens of each example, a square image of side S = ⌈√n⌉, into `count` × `count` cells.

    The real token of rank i is in row ⌊i / S⌋ and column i mod S of the image. Row r of the image is in row
    ⌊r · count / S⌋ of the cells, and the same for columns.

    Args:
      x: `[batch, length, ...]`, any floating dtype.
      mask: bool `[batch, length]`, True for real tokens; None means all are.
      count: number of cells per side, at least 1.

    Returns:
      Means `[batch, count², ...]`, float32 at least, zero for an empty cell; and bool `[batch, count²]`, False for an
      empty cell.
    """
    batch, length, *rest = x.shape
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(batch, length, -1)
    mask = jnp.ones((batch, length), bool) if mask is None else bool_mask(mask)

    def one(x, mask):
        side = grid_sides(mask.sum(), length)
        row, column = jnp.divmod(jnp.maximum(jnp.cumsum(mask) - 1, 0), side)
        cell = (row * count // side) * count + column * count // side
        sums, sizes = (jax.ops.segment_sum(y, cell, count**2) for y in (jnp.where(mask[:, None], x, 0), mask * 1))
        return sums / jnp.maximum(sizes, 1)[:, None], sizes > 0

    means, valid = jax.vmap(one)(x, mask)
    return means.reshape(batch, count**2, *rest), valid


def grid_sides(n: jax.Array, length: int) -> jax.Array:
    """⌈√n⌉, at least 1, for integers n up to `length`."""
    roots = jnp.arange(math.isqrt(max(length - 1, 0)) + 1)
    return jnp.maximum((jnp.square(roots) < n[..., None]).sum(axis=-1), 1)
