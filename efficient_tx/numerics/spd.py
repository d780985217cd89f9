"""Symmetric positive definite systems: a Cholesky solve with closed-form gradient, and a Newton-type inverse."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.lax.linalg import cholesky, triangular_solve

# Devices that round float32 factors by default would lose the inverse.
_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def spd_solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """Solves `a x = b` by Cholesky; nothing is differentiated through the factorisation.

    With x̄ the cotangent of x, that of b is a⁻¹ x̄ and that of a is −b̄ xᵀ, symmetrised: one more solve with the
    factor at hand.

    Args:
      a: `[..., m, m]`, symmetric positive definite, float32 or float64.
      b: `[..., m, n]`, the same leading dimensions and dtype.

    Returns:
      x `[..., m, n]`; NaN where `a` is not positive definite in its own precision.
    """
    return _forward(a, b)[0]


def _forward(a, b):
    factor = cholesky(a, symmetrize_input=False)
    x = _solve(factor, b)
    return x, (factor, x)


def _solve(factor, b):
    half = triangular_solve(factor, b, left_side=True, lower=True)
    return triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)


def _backward(residuals, x_bar):
    factor, x = residuals
    b_bar = _solve(factor, x_bar)
    a_bar = -_dot(b_bar, x.mT)
    return (a_bar + a_bar.mT) / 2, b_bar


spd_solve.defvjp(_forward, _backward)


def newton_inverse(a: jax.Array, iterations: int = 6) -> tuple[jax.Array, jax.Array]:
    """Inverse by the fourth-order iteration X ← ¼ X (13 I − A X (15 I − A X (7 I − A X))).

    Razavi et al. (2014); used for attention by Xiong et al. 2021 (Nyströmformer, arXiv 2102.03902) and Chen et al.
    2021 (Skyformer, arXiv 2111.00035), both starting from Aᵀ over one maximum taken over the whole batch. Here every
    matrix starts from its own: X₀ = Aᵀ / ‖A‖₁, so that no example sees another. One step maps the error E = I − A X to
    E³ (E + 3) / 4; it converges when the eigenvalues of A X₀ lie in (0, 3).

    Args:
      a: `[..., m, m]`, symmetric with spectrum in (0, 1] (then it converges), float32 or float64.
      iterations: how many steps, four matrix products each.

    Returns:
      The inverse `[..., m, m]`, and its residual ‖I − A X‖_∞ (largest absolute row sum) `[...]`: below 1 the
      iteration converges, and the relative error of X in this norm is at most the residual.
    """
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    x = a.mT / jnp.abs(a).sum(-2).max(-1)[..., None, None]
    for _ in range(iterations):
        ax = _dot(a, x)
        x = 0.25 * _dot(x, 13 * eye - _dot(ax, 15 * eye - _dot(ax, 7 * eye - ax)))
    return x, jnp.abs(eye - _dot(a, x)).sum(-1).max(-1)
