"""Sparsity: which entries of a matrix a sparse weight keeps, by one of two patterns.

"top" are the largest entries of the whole matrix; "2:4" are the two largest of each four entries along the input axis
(Mishra et al. 2021, arXiv 2104.08378). Both are the nearest matrix with the pattern in Frobenius norm.
"""

from functools import partial

import jax
import jax.numpy as jnp

from efficient_tx.checks import OptionError


def count_kept(n: int, m: int, *, pattern: str, density: float | None, default: float) -> int:
    """The number of entries that an n × m matrix keeps.

    Args:
      n, m: sizes, with n the input axis.
      pattern: "2:4" or "top".
      density: fraction of the entries that "top" keeps, in (0, 1]; None is `default`. Must be None for "2:4".
      default: see `density`.

    Raises:
      OptionError: an unknown pattern, a density outside (0, 1] or with "2:4".
    """
    if pattern not in ("2:4", "top"):
        raise OptionError("pattern", pattern, "choose '2:4' or 'top'")
    if pattern == "2:4":
        if density is not None:
            raise OptionError("density", density, "pattern '2:4' keeps a half; leave it out, or use pattern='top'")
        return (n // 4 * 2 + min(n % 4, 2)) * m
    if density is not None and not 0 < density <= 1:
        raise OptionError("density", density, "it must be above 0 and at most 1")
    return max(1, round((default if density is None else density) * n * m))


def largest(size: jax.Array, count: int) -> jax.Array:
    """True at the `count` largest entries of `size` (nonnegative, any shape); ties go to the first.

    By bisection over the bit patterns, which have the same order as the numbers; on XLA's CPU backend a sort takes 40
    times as long.
    """
    bits = 8 * size.dtype.itemsize
    patterns = jax.lax.bitcast_convert_type(size.ravel(), jnp.dtype(f"int{bits}"))

    def halve(i, least):
        higher = least + (jnp.ones((), patterns.dtype) << (bits - 2 - i))
        return jnp.where(jnp.sum(patterns >= higher) >= count, higher, least)

    least = jax.lax.fori_loop(0, bits - 1, halve, jnp.zeros((), patterns.dtype))
    above, equal = patterns > least, patterns == least
    return (above | (equal & (jnp.cumsum(equal) <= count - jnp.sum(above)))).reshape(size.shape)


def two_of_four(size: jax.Array) -> jax.Array:
    """True at the two largest of each four entries along the first axis of `size` `[n, m]`; ties go to the first."""
    n, m = size.shape
    groups = jnp.pad(size, [(0, -n % 4), (0, 0)], constant_values=-1).reshape(-1, 4, m)
    mine, other = groups[:, :, None], groups[:, None]
    place = jnp.arange(4)
    earlier = (place < place[:, None])[None, :, :, None]
    beaten = jnp.sum((other > mine) | ((other == mine) & earlier), axis=2)
    return (beaten < 2).reshape(-1, m)[:n]


def chosen(matrix: jax.Array, *, pattern: str, kept: int) -> jax.Array:
    """True at the entries that the nearest matrix with a pattern has: "2:4" along the first axis, or "top", `kept`."""
    size = jnp.abs(matrix)
    return largest(size, kept) if pattern == "top" else two_of_four(size)


@partial(jax.jit, static_argnames=("pattern", "kept"))
def sparsify(matrix: jax.Array, *, pattern: str, kept: int) -> jax.Array:
    """The nearest matrix with a pattern, "2:4" along the first axis, or "top", the `kept` largest entries."""
    return jnp.where(chosen(matrix, pattern=pattern, kept=kept), matrix, 0)


def sparse_draw(drawn: jax.Array, *, pattern: str, kept: int, variance: float) -> jax.Array:
    """`sparsify` of a random matrix, its kept entries with the mean square `variance`; float32 at least.

    The kept entries are the largest of the draw, so they have to be scaled back.
    """
    drawn = drawn.astype(jnp.promote_types(drawn.dtype, jnp.float32))
    entries = sparsify(drawn, pattern=pattern, kept=kept)
    return entries * jnp.sqrt(variance * kept / jnp.sum(entries**2))


def nonzero_only(matrix: jax.Array) -> jax.Array:
    """`matrix` itself; its entries that are exactly zero get no gradient."""
    return jnp.where(jax.lax.stop_gradient(matrix) != 0, matrix, 0)
