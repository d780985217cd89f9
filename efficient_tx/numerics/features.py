"""Orthogonal random features: directions for the exponential kernel (Choromanski et al. 2021, arXiv 2009.14794)."""

from functools import partial

import jax
import jax.numpy as jnp

from efficient_tx.numerics.factorisations import qr


@partial(jax.jit, static_argnames=("count", "dim", "dtype"))
def orthogonal_gaussian(key: jax.Array, count: int, dim: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """`count` standard normal vectors; within each block of `dim` of them, the vectors are orthogonal.

    A block is a uniformly distributed orthogonal matrix; its rows are scaled to the norms of independent normal
    vectors. The factor Q of a QR decomposition is uniformly distributed only if the diagonal of R is made positive
    (Mezzadri 2007, arXiv math-ph/0609050). Without this, LAPACK gives the first entry of every block the same sign, and
    averages over the vectors are biased.

    Args:
      key: one key.
      count: number of vectors; the last block may be incomplete.
      dim: dimension of the vectors.
      dtype: float32 or float64.

    Returns:
      `[count, dim]`.
    """
    blocks = -(-count // dim)
    normal, other = jax.random.normal(key, (2, blocks, dim, dim), dtype)
    q, r = qr(normal)
    q *= jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    return (q * jnp.linalg.norm(other, axis=-1, keepdims=True)).reshape(-1, dim)[:count]
