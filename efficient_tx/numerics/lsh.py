"""Hamming locality-sensitive hashing with sorted buckets (Han et al. 2023, HyperAttention, arXiv 2310.05869, §3).

The hash of x is the signs of its products with random Gaussian vectors: two vectors at the angle θ agree in a sign with
probability 1 − θ/π (Charikar 2002). Read as a reflected Gray code (Gray 1953), buckets whose numbers are neighbours
differ in a single sign, so that sorting by the number puts similar vectors next to each other, not only into the same
bucket. The hash serves to choose; no gradient passes through it.
"""

import jax
import jax.numpy as jnp


def gray_rank(bits: jax.Array) -> jax.Array:
    """The place of a code in the reflected Gray sequence: codes at neighbouring places differ in one bit.

    Args:
      bits: bool `[..., count]`, the most significant first; count at most 31.

    Returns:
      int32 `[...]` in [0, 2^count).
    """
    count = bits.shape[-1]
    binary = jnp.cumsum(bits, axis=-1, dtype=jnp.int32) % 2  # the inverse of b ^ (b >> 1)
    return (binary << jnp.arange(count - 1, -1, -1, dtype=jnp.int32)).sum(-1, dtype=jnp.int32)


def hash_directions(keys: jax.Array, dim: int, bits: int) -> jax.Array:
    """The Gaussian vectors of each example's hash, float32 `[batch, dim, bits]`, from one key each, `[batch]`."""
    # One axis at a time: XLA's CPU backend compiles a draw of two axes three times as long.
    return jax.vmap(lambda key: jax.random.normal(key, (dim * bits,), jnp.float32))(keys).reshape(-1, dim, bits)


def hamming_buckets(x: jax.Array, directions: jax.Array) -> jax.Array:
    """The bucket of each vector, int32 `[batch, ..., length]` in [0, 2^bits).

    Args:
      x: `[batch, ..., length, dim]`; the signs are taken in float32.
      directions: `[batch, dim, bits]`, of `hash_directions`.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    products = jnp.einsum("b...d,bdp->b...p", x, directions, precision=jax.lax.Precision.HIGHEST)
    return gray_rank(products > 0)


def sort_by_bucket(bucket: jax.Array, valid: jax.Array, buckets: int) -> jax.Array:
    """The stable order by bucket, then position, with all that is not valid after it.

    Args:
      bucket: int32 `[..., length]` in [0, buckets).
      valid: bool `[..., length]`.
      buckets: their number; (buckets + 1) · length must stay below 2^32.

    Returns:
      int32 `[..., length]`: the position of each element of the sorted sequence.

    Raises:
      ValueError: more buckets and positions than 32 bits can number.
    """
    length = bucket.shape[-1]
    if (buckets + 1) * length >= 2**32:
        raise ValueError(f"there are {buckets} buckets for a length of {length}: their product must be below 2^32")
    # One number each, all different: several times faster than a sort of (bucket, position) pairs.
    number = jnp.where(valid, bucket, buckets).astype(jnp.uint32) * length + jnp.arange(length, dtype=jnp.uint32)
    return (jnp.sort(number, axis=-1) % length).astype(jnp.int32)
