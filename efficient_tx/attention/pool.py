"""Pooling: the token mixer of PoolFormer, without parameters (Yu et al. 2022, arXiv 2111.11418).

    out_i = pool_{j near i}(x_j) − x_i

As in PoolFormer the token itself is subtracted, because the residual branch around the mixer adds it again: what goes
on is the pooled token. A control that a good method must beat. PoolFormer averages 3 × 3 patches of an image; here also
tokens of a sequence, also by their maximum. Neighbours are those among the real tokens, and the average counts what
exists, at the borders too (PoolFormer's count_include_pad=False).
"""

import functools
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from efficient_tx.attention.mixer import Mixer
from efficient_tx.attention.shapes import key_mask, token_ranks


def pool(
    x: jax.Array, *,
    mask: jax.Array | None = None, kind: str = "average", size: int = 3, grid: bool = False, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Pools the tokens near each token, and subtracts the token.

    Args:
      x: `[batch, length, features]`.
      mask: bool `[batch, length]` or `[batch, 1, 1, length]`, True for real tokens. Neighbours are those in rank among
        the real tokens, as if the others were not there.
      kind: "average" or "max".
      size: tokens in a window, odd, centred; with `causal` any number, the last of which is the token itself.
      grid: the n real tokens are a square image in row-major order, of side ⌈√n⌉ (its last row may be incomplete);
        windows are size × size.
      causal: the window trails behind the token instead of being centred.

    Returns:
      `[batch, length, features]` in the dtype of x, zero at masked positions; averages are float32 at least.

    Raises:
      ValueError: an option out of its range, or a grid without mask whose length is no square.
    """
    check_options(kind, size, grid, causal)
    batch, length, features = x.shape
    mask = key_mask(mask, batch, length)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    columns = math.isqrt(length - 1) + 1 if grid else length
    rows = columns if grid else 1
    if mask is None:
        if rows * columns != length:
            raise ValueError(f"length is {length}: a grid needs a square number of tokens, or a mask")
        pooled = window(wide.reshape(batch, rows, columns, features), None, kind, size, grid, causal)
        return (pooled.reshape(x.shape) - wide).astype(x.dtype)

    count = mask.sum(axis=1)[:, None]
    side = jnp.maximum((jnp.square(jnp.arange(columns)) < count).sum(axis=1, keepdims=True), 1) if grid else columns
    row, column = jnp.divmod(jnp.arange(rows * columns), columns)
    rank = jnp.broadcast_to(row * side + column, (batch, rows * columns))
    exists = (column < side) & (rank < count)
    order = jnp.argsort(~mask, axis=1, stable=True)
    token = jnp.take_along_axis(order, jnp.minimum(rank, length - 1), axis=1)
    cells = jnp.take_along_axis(jnp.where(mask[..., None], wide, 0), token[..., None], axis=1)
    pooled = window(
        cells.reshape(batch, rows, columns, features),
        exists.reshape(batch, rows, columns, 1), kind, size, grid, causal,
    ).reshape(cells.shape)  # fmt: skip
    rank = token_ranks(mask, batch, length)
    cell = rank // side * columns + rank % side
    pooled = jnp.take_along_axis(pooled, cell[..., None], axis=1)
    return jnp.where(mask[..., None], pooled - wide, 0).astype(x.dtype)


def window(cells: jax.Array, exists: jax.Array | None, kind: str, size: int, grid: bool, causal: bool) -> jax.Array:
    """The average or maximum of the cells `[batch, rows, columns, features]` in the window of each cell.

    `exists` is bool `[batch, rows, columns, 1]` or None (all exist); what stands at other cells is meaningless.
    """
    before = size - 1 if causal else size // 2
    axes = (1, 2) if grid else (2,)
    if exists is None:
        exists = jnp.ones((1, *cells.shape[1:3], 1), bool)
    if kind == "max":
        return slide(jnp.where(exists, cells, -jnp.inf), jnp.maximum, -jnp.inf, before, size, axes)
    sums = slide(jnp.where(exists, cells, 0), jnp.add, 0, before, size, axes)
    counts = slide(exists.astype(cells.dtype), jnp.add, 0, before, size, axes)
    return sums / jnp.maximum(counts, 1)


def slide(x: jax.Array, combine: Callable, empty: float, before: int, size: int, axes: tuple[int, ...]) -> jax.Array:
    """`size` neighbours combined along each of `axes`, from `before` places before a cell on; `empty` outside."""
    for axis in axes:
        pads = [(before, size - 1 - before) if a == axis else (0, 0) for a in range(x.ndim)]
        padded = jnp.pad(x, pads, constant_values=empty)
        shifted = (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(size))
        x = functools.reduce(combine, shifted)
    return x


def check_options(kind: str, size: int, grid: bool, causal: bool) -> None:
    """Raises ValueError, one line, for the first option that is out of its range."""
    if kind not in ("average", "max"):
        raise ValueError(f"kind is {kind!r}: it must be 'average' or 'max'")
    if size < 1:
        raise ValueError(f"size is {size}: it must be at least 1")
    if size % 2 == 0 and not causal:
        raise ValueError(f"size is {size}: a centred window has an odd number of tokens")
    if grid and causal:
        raise ValueError("grid is True: a causal window is one-dimensional, use grid=False")


class Pool(Mixer):
    """PoolFormer's mixer; options as `pool`.

    It has no parameters: heads, head_dim, linear and dtype mean nothing here.
    """

    paper = "Yu et al. 2022, arXiv 2111.11418"
    computes = "the average or maximum of neighbours, no parameters: a control"
    cost = "n"
    has_positions: ClassVar[bool] = False

    def __init__(
        self, features: int, *, kind: str = "average", size: int = 3, grid: bool = False,
        heads=None, head_dim=None, linear=None, dtype=None, rngs=None, **common,
    ):  # fmt: skip
        super().__init__(features, **common)
        check_options(kind, size, grid, self.causal)
        self.kind, self.size, self.grid = kind, size, grid

    def mix(self, x, *, mask, key):
        return pool(x, mask=mask, kind=self.kind, size=self.size, grid=self.grid, causal=self.causal)
