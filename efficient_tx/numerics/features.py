"""Orthogonal random features: directions for the exponential kernel (Choromanski et al. 2021, arXiv 2009.14794)."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.jit, static_argnames=("count", "dim", "dtype"))
def orthogonal_gaussian(key: jax.Array, count: int, dim: int, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """`count` vectors, each of them standard normal, in blocks of `dim` that are orthogonal to each other.

    A block is a uniformly distributed orthogonal matrix whose rows get the norms of independent normal vectors. The
    factor of a QR decomposition is uniformly distributed only with the signs of R's diagonal made positive (Mezzadri
    2007, arXiv math-ph/0609050): as LAPACK leaves it, the first entry of every block has one sign, and averages over
    these vectors are biased.

    Args:
      key: one key.
      count: how many; the last block may be in part.
      dim: of the vectors.
      dtype: float32 or float64.

    Returns:
      `[count, dim]`.
    """
    blocks = -(-count // dim)
    normal, other = jax.random.normal(key, (2, blocks, dim, dim), dtype)
    q, r = jnp.linalg.qr(normal)
    q *= jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[:, None, :]
    return (q * jnp.linalg.norm(other, axis=-1, keepdims=True)).reshape(-1, dim)[:count]
