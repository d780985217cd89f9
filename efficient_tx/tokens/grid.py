"""Square grids: the n real tokens of an example as an image of side ⌈√n⌉ in row-major order."""

import math

import jax
import jax.numpy as jnp

from efficient_tx.checks import OptionError
from efficient_tx.tokens.mask import bool_mask, compact, over, token_ranks
from efficient_tx.tokens.segments import grid_sides


def lay_out(x: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The real tokens of `x` `[batch, length, ...]` as cells `[batch, side, side, ...]`; empty cells are zero.

    `side` belongs to the whole length. An example with fewer real tokens fills the upper left corner; the last row of
    its square may be incomplete. Also returns which cells hold a token, bool `[batch, side, side]`.

    Raises:
      ValueError: there is no mask, and the length is no square.
    """
    batch, length, *rest = x.shape
    side = math.isqrt(length - 1) + 1
    if mask is None:
        check_square(length, mask)
        return x.reshape(batch, side, side, *rest), jnp.ones((batch, side, side), bool)
    mask = bool_mask(mask)
    n = mask.sum(axis=1)[:, None]
    own = grid_sides(n, length)
    row, column = jnp.divmod(jnp.arange(side * side), side)
    rank = row * own + column
    exists = (column < own) & (rank < n)
    cells = jnp.take_along_axis(compact(x, mask), over(jnp.where(exists, rank, 0), x), axis=1)
    cells = jnp.where(over(exists, x), cells, 0)
    return cells.reshape(batch, side, side, *rest), exists.reshape(batch, side, side)


def take_up(cells: jax.Array, mask: jax.Array | None, length: int) -> jax.Array:
    """The inverse of `lay_out`: the cells of the real tokens as `[batch, length, ...]`, zero at padding."""
    batch, side, _, *rest = cells.shape
    cells = cells.reshape(batch, side * side, *rest)
    if mask is None:
        return cells
    mask = bool_mask(mask)
    row, column = jnp.divmod(token_ranks(mask, batch, length), grid_sides(mask.sum(axis=1)[:, None], length))
    out = jnp.take_along_axis(cells, over(row * side + column, cells), axis=1)
    return jnp.where(over(mask, cells), out, 0)


def check_square(length: int, mask: jax.Array | None) -> None:
    """Raises ValueError if there is no mask and `length` is no square number."""
    if mask is None and math.isqrt(length) ** 2 != length:
        raise OptionError("length", length, "a grid needs a square number of tokens, or a mask")
