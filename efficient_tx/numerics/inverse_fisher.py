"""Inverse Fisher: products with the inverse of λ I + (1/m) Σ g gᵀ over m gradients, without the matrix.

M-FAC (Frantar, Kurtic and Alistarh 2021, arXiv 2107.03356). With the gradients in the rows of G `[m, d]`:

H⁻¹ x = (x − Gᵀ (m λ I + G Gᵀ)⁻¹ G x) / λ        H⁻¹ Gᵀ = m Gᵀ (m λ I + G Gᵀ)⁻¹

Both are Woodbury's identity, and equal to the published recursion over the gradients. The second form, for a gradient
itself, has no difference that λ divides.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.numerics.factorisations import cholesky, solve_lower, solve_lower_transposed

# Devices that round float32 factors by default would make differences of products useless.
_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

# In float32 this is 8e-6 of a squared norm: below the published λ of 1e-5, if gradients are clipped to norm 1.
ROUNDINGS = 64


def _factor(gram: jax.Array, damping: float) -> jax.Array:
    """The lower Cholesky factor of m λ I + G Gᵀ, from G Gᵀ `[..., m, m]`.

    A gradient so large that its dtype does not resolve λ beside it gets a damping that it resolves, ROUNDINGS of its
    squared norm. So the factor always exists, and products are right to some percent at least.
    """
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    damped = jnp.maximum(damping, ROUNDINGS * jnp.finfo(gram.dtype).eps * squares)
    return cholesky(gram + gram.shape[-1] * damped[..., None] * jnp.eye(gram.shape[-1], dtype=gram.dtype))


class InverseFisher(NamedTuple):
    """H⁻¹ = (I − RᵀR) / λ for fixed gradients.

    Attributes:
      reduced: R = L⁻¹ G, `[..., m, d]`, with L Lᵀ = m λ I + G Gᵀ.
      damping: λ.
      squares: the diagonal of (1/m) GᵀG, `[..., d]`.
    """

    reduced: jax.Array
    damping: float
    squares: jax.Array

    def times(self, x: jax.Array) -> jax.Array:
        """H⁻¹ x for x `[..., d]`."""
        along = _einsum("...md,...d->...m", self.reduced, x)
        return (x - _einsum("...md,...m->...d", self.reduced, along)) / self.damping

    @property
    def diagonal(self) -> jax.Array:
        """The diagonal of H⁻¹, `[..., d]`, positive: not below 1 / H_jj, its bound, whatever the rounding."""
        gone = jnp.sum(self.reduced**2, axis=-2)
        return jnp.maximum((1 - gone) / self.damping, 1 / (self.damping + self.squares))


def inverse_fisher(gradients: jax.Array, damping: float) -> InverseFisher:
    """H⁻¹ of the gradients, for products with any vector and for its diagonal.

    Args:
      gradients: G, `[..., m, d]`, float32 or float64; all m count. None (m = 0) leave H = λ I. Time O(m² d).
      damping: λ, above 0. A product loses the share |G|² / (m λ) of its digits: with small λ, use float64.
    """
    *lead, count, size = gradients.shape
    if not count:
        return InverseFisher(gradients, damping, jnp.zeros((*lead, size), gradients.dtype))
    factor = _factor(_einsum("...md,...nd->...mn", gradients, gradients), damping)
    return InverseFisher(solve_lower(factor, gradients), damping, jnp.mean(gradients**2, axis=-2))


class Window(NamedTuple):
    """The last m gradients of a model, in a ring.

    Attributes:
      gradients: a tree like the model's parameters; each array has an axis of m gradients first. Those not yet there
        are zero.
      gram: G Gᵀ, `[m, m]`, over all parameters.
      count: int32 scalar, gradients that have come; the newest one has the place (count − 1) mod m.
    """

    gradients: Any
    gram: jax.Array
    count: jax.Array


def empty(params: Any, size: int) -> Window:
    """A window of `size` gradients of the parameters, which takes `size` times their memory."""
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(params))
    gradients = jax.tree.map(lambda leaf: jnp.zeros((size, *leaf.shape), dtype), params)
    return Window(gradients, jnp.zeros((size, size), dtype), jnp.int32(0))


def slide(window: Window, gradient: Any) -> Window:
    """The window with a gradient in the place of its oldest one; one row and column of G Gᵀ change."""
    place = window.count % len(window.gram)
    gradients = jax.tree.map(lambda rows, new: rows.at[place].set(new), window.gradients, gradient)
    products = [
        _einsum("md,d->m", rows.reshape(len(rows), -1), rows[place].ravel()) for rows in jax.tree.leaves(gradients)
    ]
    row = sum(products, jnp.zeros(len(window.gram), window.gram.dtype))
    return Window(gradients, window.gram.at[place].set(row).at[:, place].set(row), window.count + 1)


def newest_times(window: Window, damping: float) -> Any:
    """H⁻¹ g for the newest gradient g of a window, a tree like the parameters; m is the size of the window."""
    size = len(window.gram)
    factor = _factor(window.gram, damping)
    unit = jax.nn.one_hot((window.count - 1) % size, size, dtype=window.gram.dtype)[:, None]
    shares = size * solve_lower_transposed(factor, solve_lower(factor, unit))[:, 0]
    return jax.tree.map(lambda rows: _einsum("m,m...->...", shares, rows), window.gradients)
