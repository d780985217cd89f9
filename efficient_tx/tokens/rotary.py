"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in one and two dimensions."""

import math

import jax
import jax.numpy as jnp

from efficient_tx.checks import OptionError
from efficient_tx.tokens.mask import bool_mask, token_ranks
from efficient_tx.tokens.segments import grid_sides

# Numbers that say where a token is, by layout.
COORDINATES = {"rope": 1, "rope2d": 2}


def check_width(width: int, layout: str, option: str, value: float) -> None:
    """Raises OptionError for the option that sets the width of a head, unless this can be rotated."""
    pairs = 2 * COORDINATES[layout]
    if width % pairs:
        made = "" if width == value else f"what turns is {width} wide, and "
        raise OptionError(option, value, f"{made}{layout} needs a multiple of {pairs}")


def rotate(
    x: jax.Array, mask: jax.Array | None, *,
    layout: str = "rope", base: float = 10000.0, before: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Rotates each pair of channels of `x` by an angle proportional to the token's position.

    A rotation keeps norms, and inner products and distances depend on relative positions only. So it suits softmax and
    Gaussian kernels alike. A token's position is its rank among the real tokens of its example.

    Args:
      x: `[batch, length, heads, head_dim]`; channel c pairs with channel c + head_dim/2.
      mask: bool `[batch, length]` or None (all tokens real).
      layout: "rope" for a sequence; "rope2d" for a square image in row-major order, of side ⌈√n⌉ with n real tokens:
        half of the pairs rotate with the row, half with the column.
      before: number of tokens before these in each example, int32 `[batch]`; only for "rope".
      base: of the rotation frequencies; pair i of n rotates by base^(−i/n) radians per position.

    Returns:
      The same shape and dtype; angles and rotation are computed in float32 at least.

    Raises:
      ValueError: head_dim is odd ("rope") or no multiple of four ("rope2d"); length is no square ("rope2d" without
        mask).
    """
    batch, length, _, dim = x.shape
    check_width(dim, layout, "head_dim", dim)
    mask = bool_mask(mask)
    positions = token_ranks(mask, batch, length)
    if before is not None:
        positions = positions + before[:, None]
    if layout == "rope2d":
        if mask is None and math.isqrt(length) ** 2 != length:
            raise OptionError("length", length, "rope2d needs the tokens of a square grid, or a mask")
        side = math.isqrt(length) if mask is None else grid_sides(mask.sum(axis=1)[:, None], length)
        coordinates = [positions // side, positions % side]
    else:
        coordinates = [positions]
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    pairs = dim // (2 * COORDINATES[layout])
    frequency = base ** (-jnp.arange(pairs, dtype=dtype) / pairs)
    angle = jnp.concatenate([c[..., None].astype(dtype) * frequency for c in coordinates], axis=-1)[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)
