"""Leverage scores of the rows of a matrix: exact, ridge and online (each row relative to the rows before it).

The score τ_i = a_iᵀ(AᵀA)⁺a_i = max_x (a_iᵀx)² / ‖Ax‖² is the largest share that row i can have of any ‖Ax‖²; the scores
sum to the rank of A. With a ridge λ, (AᵀA + λI)⁻¹ replaces (AᵀA)⁺. The online score (Cohen, Musco and Pachocki 2016,
arXiv 1604.05448) replaces A by its rows up to i. It is at least the ridge score. The online scores sum to at most
d log(1 + ‖A‖_F² / (dλ)).

All scores are computed from the Gram matrix, d² numbers for any number of rows. A sketch of A is not used: it would
save at most half of the n·d² operations, and the scores would be wrong by a factor.
"""

from functools import partial

import jax
import jax.numpy as jnp

from efficient_tx.numerics.factorisations import cholesky, eigh, solve_lower

_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def leverage_scores(rows: jax.Array, *, mask: jax.Array | None = None, ridge: float = 0.0) -> jax.Array:
    """The (ridge) leverage score of every row.

    Eigenvalues of the Gram matrix below 8 eps times the largest one are rounding errors and count as zero, so that the
    scores of a rank-deficient matrix sum to its rank.

    Args:
      rows: `[..., n, d]`. No gradient flows through the scores: they serve to select rows.
      mask: bool `[..., n]`; rows that are False score 0, whatever their content.
      ridge: λ, 0 or more.

    Returns:
      Scores in [0, 1], `[..., n]`, promote_types(dtype, float32).
    """
    rows = selecting_rows(rows, mask)
    whitened = _dot(rows, whitening(_dot(rows.mT, rows), ridge))
    return jnp.minimum(jnp.square(whitened).sum(-1), 1)


def online_ridge_scores(rows: jax.Array, *, ridge: float, mask: jax.Array | None = None, chunk: int = 64) -> jax.Array:
    """The ridge leverage score of every row among the rows up to and including it.

    With G = λI + Σ_{j<i} a_j a_jᵀ and β = a_iᵀG⁻¹a_i, row i scores β / (1 + β). For a chunk X of rows, the values 1 + β
    are the squared pivots in the Cholesky factor of I + X G⁻¹ Xᵀ, so only G is carried from chunk to chunk.

    Args:
      rows: `[..., n, d]`; no gradient flows.
      ridge: λ above 0. A λ below 16 · chunk · eps · ‖a_i‖² (1e-4 ‖a_i‖² in float32) or below the rounding error of G
        has no effect.
      mask: bool `[..., n]`; rows that are False score 0 and do not affect the other rows.
      chunk: rows per chunk; it changes only rounding errors.

    Returns:
      Scores in [0, 1), `[..., n]`, promote_types(dtype, float32).
    """
    rows = selecting_rows(rows, mask)
    *lead, n, d = rows.shape
    count = -(-n // chunk)
    rows = jnp.pad(rows, (*((0, 0) for _ in lead), (0, count * chunk - n), (0, 0)))
    chunks = jnp.moveaxis(rows.reshape(*lead, count, chunk, d), -3, 0)
    eye = jnp.eye(chunk, dtype=rows.dtype)
    # Longer rows would leave no digits to the other rows of their chunk. Their own score is 1 up to 1 / longest.
    longest = 1 / (16 * chunk * jnp.finfo(rows.dtype).eps)

    def advance(gram, x):
        whitened = solve_lower(ridge_factor(gram, ridge), x.mT)
        norm = jnp.square(whitened).sum(-2, keepdims=True)
        whitened *= jax.lax.rsqrt(jnp.maximum(norm / longest, 1))
        pivots = jnp.diagonal(cholesky(eye + _dot(whitened.mT, whitened)), axis1=-2, axis2=-1)
        return gram + _dot(x.mT, x), 1 - 1 / jnp.square(pivots)

    _, scores = jax.lax.scan(advance, jnp.zeros((*lead, d, d), rows.dtype), chunks)
    return jnp.maximum(jnp.moveaxis(scores, 0, -2).reshape(*lead, -1)[..., :n], 0)


def selecting_rows(rows: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`rows` without gradient, in promote_types(dtype, float32), zero where masked."""
    rows = jax.lax.stop_gradient(rows).astype(jnp.promote_types(rows.dtype, jnp.float32))
    return rows if mask is None else jnp.where(mask[..., None], rows, 0)


def whitening(gram: jax.Array, ridge: float = 0.0) -> jax.Array:
    """T `[..., d, d]` with T Tᵀ = (gram + ridge · I)⁺, `gram` positive semi-definite up to rounding."""
    values, vectors = eigh(gram)
    values = jnp.maximum(values, 0) + ridge
    seen = values > 8 * jnp.finfo(gram.dtype).eps * values[..., -1:]
    return vectors * jnp.where(seen, jax.lax.rsqrt(jnp.where(seen, values, 1)), 0)[..., None, :]


def ridge_factor(gram: jax.Array, ridge: float) -> jax.Array:
    """The lower Cholesky factor of gram + λI; λ is `ridge`, above 0, plus an allowance for rounding errors."""
    rounding = 2 * jnp.finfo(gram.dtype).eps * jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]
    eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
    return cholesky(gram + (ridge + rounding) * eye)
