"""Hamming locality-sensitive hashing with sorted buckets (Han et al. 2023, HyperAttention, arXiv 2310.05869, §3).

The hash of x is the signs of its inner products with random Gaussian vectors. Two vectors at the angle θ agree in a
sign with probability 1 − θ/π (Charikar 2002). The signs are read as a reflected Gray code (Gray 1953), so neighbouring
bucket numbers differ in one sign. Sorting by bucket number then also puts similar vectors of different buckets near
each other. The hash only selects keys; no gradient flows through it.
"""

import jax
import jax.numpy as jnp


def gray_rank(bits: jax.Array) -> jax.Array:
    """The rank of a code in the reflected Gray sequence: codes of neighbouring ranks differ in one bit.

    Args:
      bits: bool `[..., count]`, the most significant first; count at most 31.

    Returns:
      int32 `[...]` in [0, 2^count).
    """
    count = bits.shape[-1]
    binary = jnp.cumsum(bits, axis=-1, dtype=jnp.int32) % 2  # the inverse of b ^ (b >> 1)
    return (binary << jnp.arange(count - 1, -1, -1, dtype=jnp.int32)).sum(-1, dtype=jnp.int32)


def hash_directions(keys: jax.Array, dim: int, bits: int) -> jax.Array:
    """The Gaussian vectors of each example's hash, float32 `[batch, dim, bits]`; `keys` is `[batch]`."""
    # A draw with one axis: XLA's CPU backend takes three times as long to compile a draw with two.
    return jax.vmap(lambda key: jax.random.normal(key, (dim * bits,), jnp.float32))(keys).reshape(-1, dim, bits)


def hamming_buckets(x: jax.Array, directions: jax.Array) -> jax.Array:
    """The bucket of each vector, int32 `[batch, ..., length]` in [0, 2^bits).

    Args:
      x: `[batch, ..., length, dim]`; the signs are taken in float32.
      directions: `[batch, dim, bits]`, from `hash_directions`.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    products = jnp.einsum("b...d,bdp->b...p", x, directions, precision=jax.lax.Precision.HIGHEST)
    return gray_rank(products > 0)


def sort_by_bucket(bucket: jax.Array, valid: jax.Array, buckets: int) -> jax.Array:
    """The stable order by bucket, then position; invalid elements come last.

    Args:
      bucket: int32 `[..., length]` in [0, buckets).
      valid: bool `[..., length]`.
      buckets: number of buckets; (buckets + 1) · length must be below 2^32.

    Returns:
      int32 `[..., length]`: for each place in the sorted sequence, the position of its element.

    Raises:
      ValueError: (buckets + 1) · length does not fit into 32 bits.
    """
    length = bucket.shape[-1]
    if (buckets + 1) * length >= 2**32:
        raise ValueError(f"there are {buckets} buckets for a length of {length}: their product must be below 2^32")
    # One distinct number per element: several times faster than a sort of (bucket, position) pairs.
    number = jnp.where(valid, bucket, buckets).astype(jnp.uint32) * length + jnp.arange(length, dtype=jnp.uint32)
    return (jnp.sort(number, axis=-1) % length).astype(jnp.int32)
