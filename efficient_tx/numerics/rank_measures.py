"""Rank measures: how much of a matrix a low rank would keep, without its decomposition."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from efficient_tx.numerics.factorisations import svd


def column_norm_sum(matrix: jax.Array) -> jax.Array:
    """The sum of the min(n, d) largest column norms of a matrix `[n, d]`, an estimate of its nuclear norm; O(n d).

    It is at most √min(n, d) ‖A‖_F. If d ≤ n, it is not below the nuclear norm, and equal for orthogonal columns; if
    d > n, the columns left out may put it below. It depends on the basis of the columns.
    """
    norms = jnp.linalg.norm(matrix, axis=0)
    return jnp.sum(jax.lax.top_k(norms, min(matrix.shape))[0])


def matrix_nuclear_norm(states: jax.Array) -> jax.Array:
    """Matrix Nuclear-Norm of hidden states (Li et al. 2024, arXiv 2410.10672), higher if they fill more dimensions.

    The states are centred, each is scaled to length 1, and `column_norm_sum` taken.

    Args:
      states: `[tokens, d]`, float32 or float64. A state that is the mean of all stays zero.

    Returns:
      A scalar of at most √(tokens · min(tokens, d)); the published figure divides it by the number of tokens.
    """
    centred = states - states.mean(0)
    lengths = jnp.linalg.norm(centred, axis=1, keepdims=True)
    return column_norm_sum(jnp.where(lengths > 0, centred / jnp.where(lengths > 0, lengths, 1), 0))


def residual_errors(
    times: Callable[[jax.Array], jax.Array], shape: tuple[int, int], size: int, *, key: jax.Array
) -> jax.Array:
    """Estimates of ‖A − A_k‖_F for k = 0 … size − 1, from one sketch S A T.

    A_k is the best approximation of rank k; S and T are Gaussian (Li, Lin and Woodruff 2024, arXiv 2408.08494). The
    estimate is ‖B − B_k‖_F for B = S A T / size, over 1 − k / size, as S and T see that share of the directions that
    A_k leaves on either side.

    Bias: squared, the estimate is right in the mean at k = 0, and if the first k singular values are far above the
    others; else it is too low, as B_k fits the sketch's own noise. Undivided and squared, it is in the mean never above
    ‖A − A_k‖²_F, as B − B_k is not larger than S (A − A_k) T / size. With size ≥ 4 k the division adds at most a third.

    Args:
      times: X `[m, size]` -> A X `[n, size]`; A itself is not needed.
      shape: (n, m) of A.
      size: of the sketch. For a relative error ε, k / ε² up to a constant.
      key: of S and T.

    Returns:
      `[size]`, in the dtype of A X.
    """
    n, m = shape
    left, right = jax.random.split(key)
    product = times(jax.random.normal(right, (m, size)))
    sketch = jax.random.normal(left, (size, n), product.dtype) @ product / size
    singular = svd(sketch)[1]
    tails = jnp.sqrt(jnp.cumsum(singular[::-1] ** 2)[::-1])
    return tails / (1 - jnp.arange(size) / size)
