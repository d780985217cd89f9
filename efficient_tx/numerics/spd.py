"""Symmetric positive definite systems: a Cholesky solve with closed-form gradient, and a Newton-type inverse."""

from functools import partial

import jax
import jax.numpy as jnp

from efficient_tx.numerics.factorisations import cholesky, solve_lower, solve_lower_transposed

# Devices that round float32 factors by default would make the inverse useless.
_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def spd_solve(a: jax.Array, b: jax.Array) -> jax.Array:
    """Solves `a x = b` by Cholesky; the gradient does not differentiate through the factorisation.

    With x̄ the cotangent of x, the cotangent of b is b̄ = a⁻¹ x̄ and that of a is −b̄ xᵀ, symmetrised. This is one more
    solve with the same factor.

    Args:
      a: `[..., m, m]`, symmetric positive definite, float32 or float64.
      b: `[..., m, n]`, the same leading dimensions and dtype.

    Returns:
      x `[..., m, n]`; NaN if `a` is not positive definite in its precision.
    """
    return _forward(a, b)[0]


def _forward(a, b):
    factor = cholesky(a)
    x = _solve(factor, b)
    return x, (factor, x)


def _solve(factor, b):
    return solve_lower_transposed(factor, solve_lower(factor, b))


def _backward(residuals, x_bar):
    factor, x = residuals
    b_bar = _solve(factor, x_bar)
    a_bar = -_dot(b_bar, x.mT)
    return (a_bar + a_bar.mT) / 2, b_bar


spd_solve.defvjp(_forward, _backward)


def newton_inverse(a: jax.Array, iterations: int = 6, *, start: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Inverse by the fourth-order iteration X ← ¼ X (13 I − A X (15 I − A X (7 I − A X))).

    Razavi et al. (2014); used for attention by Xiong et al. 2021 (Nyströmformer, arXiv 2102.03902) and Chen et al. 2021
    (Skyformer, arXiv 2111.00035). One step maps the error E = I − A X to E³ (E + 3) / 4. The iteration converges if the
    eigenvalues of A X₀ lie in (0, 3); a small eigenvalue grows 3.25 times per step.

    Args:
      a: `[..., m, n]`, float32 or float64.
      iterations: number of steps, four matrix products each.
      start: X₀ `[..., n, m]`. None means Aᵀ / (‖A‖₁ ‖A‖_∞), from which the iteration converges to the pseudo-inverse of
        any A. Unlike the published code, which takes one maximum over the batch, each matrix has its own norms. For a
        symmetric A with spectrum in (0, 1] the identity is a better start: then E is I − A, not I − A² / ‖A‖₁².

    Returns:
      The inverse `[..., n, m]`, zero for a zero matrix; and its residual ‖I − A X‖_∞ (largest absolute row sum)
      `[...]`. If the residual is below 1, the iteration converges, and the relative error of X in this norm is at most
      the residual. If A has no right inverse, the residual stays at 1 or above.
    """
    if start is None:
        rows, columns = (jnp.abs(a).sum(axis).max(-1) for axis in (-1, -2))
        norms = (rows * columns)[..., None, None]
        start = a.mT / jnp.where(norms > 0, norms, 1)
    eye = jnp.eye(a.shape[-2], dtype=a.dtype)

    def step(x, _):
        ax = _dot(a, x)
        return 0.25 * _dot(x, 13 * eye - _dot(ax, 15 * eye - _dot(ax, 7 * eye - ax))), None

    x, _ = jax.lax.scan(step, start, length=iterations)
    return x, jnp.abs(eye - _dot(a, x)).sum(-1).max(-1)


def newton_raphson_inverse(a: jax.Array, iterations: int = 20) -> tuple[jax.Array, jax.Array]:
    """Inverse by the second-order iteration X ← X (2 I − A X) (Schulz 1933), with the gradient of the inverse.

    As in SOFT (Lu et al. 2021, arXiv 2110.11945), X₀ = 1.8 A / ‖A‖_∞², with each matrix's own norm. One step maps the
    error I − A X to its square, so an eigenvalue λ is resolved if 2^iterations λ² is above ‖A‖_∞².

    The iterations are not differentiated: with X̄ the cotangent of X, the cotangent of A is −X X̄ X, symmetrised. This
    gradient is as accurate as the convergence of the iteration; see the residual.

    Args:
      a: `[..., m, m]`, symmetric positive definite, float32 or float64.
      iterations: number of steps, two matrix products each.

    Returns:
      The inverse `[..., m, m]`, and its residual ‖I − A X‖_∞ (largest absolute row sum) `[...]`, through which no
      gradient flows. If the residual is below 1, the relative error of X in this norm is at most the residual.
    """
    x = _newton_raphson(a, iterations)
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    return x, jax.lax.stop_gradient(jnp.abs(eye - _dot(a, x)).sum(-1).max(-1))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _newton_raphson(a, iterations):
    start = 1.8 * a / jnp.square(jnp.abs(a).sum(-1).max(-1))[..., None, None]
    return jax.lax.fori_loop(0, iterations, lambda _, x: 2 * x - _dot(x, _dot(a, x)), start)


def _newton_raphson_backward(iterations, x, x_bar):
    a_bar = -_dot(x, _dot(x_bar, x))
    return ((a_bar + a_bar.mT) / 2,)


_newton_raphson.defvjp(lambda a, iterations: (_newton_raphson(a, iterations),) * 2, _newton_raphson_backward)
