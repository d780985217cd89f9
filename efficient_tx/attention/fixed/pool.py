"""Pooling: the token mixer of PoolFormer, without parameters (Yu et al. 2022, arXiv 2111.11418).

    out_i = pool_{j near i}(x_j) − x_i

As in PoolFormer, the token itself is subtracted, because the residual connection around the mixer adds it again: the
sum is the pooled token. A baseline that a good method must beat. PoolFormer averages 3 × 3 patches of an image. Here
the tokens may also form a sequence, and the maximum is an option. Only real tokens are neighbours, and at borders the
average is over existing tokens (PoolFormer's count_include_pad=False).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.mixer import Mixer
from efficient_tx.attention.base.options import checked_by
from efficient_tx.checks import OptionError, at_least, one_of
from efficient_tx.kernels.shapes import check_rank
from efficient_tx.tokens.grid import lay_out, take_up
from efficient_tx.tokens.mask import compact, key_mask, spread

KINDS = ("average", "max")


def check_options(*, kind, size, grid, causal):
    """Raises ValueError, one line, for the first option that is out of its range."""
    one_of(KINDS, kind=kind)
    at_least(1, size=size)
    if size % 2 == 0 and not causal:
        raise OptionError("size", size, "a centred window has an odd number of tokens")
    if grid and causal:
        raise ValueError("grid is True: a causal window is one-dimensional, use grid=False")


@checked_by(check_options)
def pool(
    x: jax.Array, *,
    mask: jax.Array | None = None, kind: str = "average", size: int = 3, grid: bool = False, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Pools the tokens near each token and subtracts the token itself.

    Args:
      x: `[batch, length, features]`.
      mask: bool `[batch, length]` or `[batch, 1, 1, length]`, True for real tokens. Neighbours are counted among the
        real tokens.
      kind: kind of pooling, "average" or "max".
      size: number of tokens in a window, odd and centred at the token; with `causal` any number, and the token is the
        last.
      grid: whether the n real tokens are a square image in row-major order, of side ⌈√n⌉ (its last row may be
        incomplete), with windows of size × size.
      causal: whether the window ends at the token instead of being centred.

    Returns:
      `[batch, length, features]` in the dtype of x, zero at masked positions; averages are float32 at least.

    Raises:
      ValueError: an option out of its range, or a grid without mask if the length is no square.
    """
    check_rank("batch, length, features", x=x)
    batch, length, _ = x.shape
    mask = key_mask(mask, batch, length)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    if grid:
        cells, exists = lay_out(wide, mask)
    else:
        real = jnp.ones((batch, length), bool) if mask is None else compact(mask, mask)
        cells, exists = compact(wide, mask)[:, None], real[:, None]
    pooled = window(cells, exists[..., None], kind, size, grid, causal)
    pooled = take_up(pooled, mask, length) if grid else spread(pooled[:, 0], mask)
    out = pooled - wide
    return (out if mask is None else jnp.where(mask[..., None], out, 0)).astype(x.dtype)


def window(cells: jax.Array, exists: jax.Array, kind: str, size: int, grid: bool, causal: bool) -> jax.Array:
    """The average or maximum of the cells `[batch, rows, columns, features]` in the window of each cell.

    `exists` is bool `[batch, rows, columns, 1]`; the output at other cells is undefined.
    """
    before = size - 1 if causal else size // 2
    axes = (1, 2) if grid else (2,)
    if kind == "max":
        return slide(jnp.where(exists, cells, -jnp.inf), jnp.maximum, -jnp.inf, before, size, axes)
    sums = slide(jnp.where(exists, cells, 0), jnp.add, 0, before, size, axes)
    counts = slide(exists.astype(cells.dtype), jnp.add, 0, before, size, axes)
    return sums / jnp.maximum(counts, 1)


def slide(x: jax.Array, combine: Callable, empty: float, before: int, size: int, axes: tuple[int, ...]) -> jax.Array:
    """Combines `size` neighbours along each of `axes`, starting `before` cells before each cell; `empty` outside."""
    for axis in axes:
        pads = [(before, size - 1 - before) if a == axis else (0, 0) for a in range(x.ndim)]
        padded = jnp.pad(x, pads, constant_values=empty)
        shifted = (jax.lax.slice_in_dim(padded, i, i + x.shape[axis], axis=axis) for i in range(size))
        x = functools.reduce(combine, shifted)
    return x


class Pool(Mixer):
    """PoolFormer's mixer; options as in `pool`.

    It has no parameters: heads, head_dim, linear and dtype are ignored.
    """

    paper = "Yu et al. 2022, arXiv 2111.11418"
    computes = "the average or maximum of neighbours, no parameters: a control"
    cost = "n"
    function = staticmethod(pool)
    windowed = True
    has_positions = False

    def state_bytes(self, length: int) -> int:
        return 4 * min(self.size - 1, length) * self.features

    def empty(self, batch: int, max_len: int | None, dtype: jnp.dtype | None) -> "Recent":
        tokens = jnp.zeros((batch, self.size - 1, self.features), jnp.float32 if dtype is None else dtype)
        return Recent(jnp.zeros(batch, jnp.int32), tokens)

    def advance(
        self, x: jax.Array, state: "Recent", *, mask: jax.Array | None, first: bool
    ) -> tuple[jax.Array, "Recent"]:  # fmt: skip
        slots, length = state.tokens.shape[1], x.shape[1]
        new = jnp.full(len(x), length) if mask is None else mask.sum(1)
        count = state.count + new.astype(jnp.int32)
        tokens = jnp.concatenate([state.tokens.astype(x.dtype), x], axis=1)
        # The state's tokens are its last slots.
        before = jnp.arange(slots) >= slots - state.count[:, None]
        real = jnp.concatenate([before, jnp.arange(length) < new[:, None]], axis=1)
        out = pool(tokens, **self.arguments(mask=real, key=None))[:, slots:]
        last = jnp.take_along_axis(tokens, (new[:, None] + jnp.arange(slots))[..., None], axis=1)
        return out, Recent(count, last.astype(state.tokens.dtype))


class Recent(NamedTuple):
    """The state of a decoder: number of tokens `[batch]`, and the last `size − 1` of them."""

    count: jax.Array
    tokens: jax.Array
