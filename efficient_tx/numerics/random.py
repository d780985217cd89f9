"""Randomness per example: keys, dropout, sampling among real tokens.

Every draw is made for one example with the length axis first. So its first n rows do not depend on the padded length,
on the other examples of the batch, or on how the batch is split over devices.
"""

import jax
import jax.numpy as jnp


def example_keys(key: jax.Array | None, batch: int) -> jax.Array | None:
    """One key per example, `[batch]`: `key` itself if it has this shape, else the scalar `key` folded per example.

    Raises:
      ValueError: `key` is neither a scalar nor `[batch]` typed keys (`jax.random.key`).
    """
    if key is None:
        return None
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"key has dtype {key.dtype}: pass typed keys, jax.random.key(seed), not raw uint32 ones")
    if key.shape == ():
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    if key.shape != (batch,):
        raise ValueError(f"key has shape {key.shape}: pass one key, or one per example, ({batch},)")
    return key


def evaluation_keys(batch: int) -> jax.Array:
    """The same fixed key for every example, `[batch]`, for sampling at evaluation; jax's default PRNG has no effect."""
    return jnp.broadcast_to(jax.random.key(0, impl="threefry2x32"), (batch,))


def fold(keys: jax.Array | None, data: int) -> jax.Array | None:
    """New keys `[batch]` for the use with the number `data`; None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def check_rate(rate: float, name: str = "dropout") -> None:
    """Raises ValueError unless `rate` is a valid dropout rate: at least 0, below 1 − 1/131072."""
    if not 0 <= rate <= 1 or round(rate * 65536) == 65536:
        raise ValueError(f"{name} is {rate}: it must be at least 0 and below 1")


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes entries of `x` `[batch, length, ...]` with probability `rate` and scales the others by 1/(1 − rate).

    `keys` are `[batch]`; None means evaluation and returns `x` itself. Random bits are most of the cost, so an entry
    uses 16 bits instead of 32. The rate is rounded to a multiple of 1/65536; the scale follows the rounded rate, so the
    mean stays exact.
    """
    if rate == 0.0 or keys is None:
        return x
    *lead, features = x.shape[1:]
    words = jax.vmap(lambda key: jax.random.bits(key, (*lead, -(-features // 2)), jnp.uint32))(keys)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(*words.shape[:-1], -1)[..., :features]
    threshold = round(rate * 65536)
    return jnp.where(bits >= threshold, x * (65536 / (65536 - threshold)), 0).astype(x.dtype)


def sample_tokens(keys: jax.Array, mask: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Uniform sample of `count` real tokens of each example, without replacement.

    The draw depends on a token's rank among the real tokens, so padding at any place changes nothing.

    Args:
      keys: one key per example, `[batch]`.
      mask: bool `[batch, length]`, True for real tokens.
      count: number of tokens; at most `length` are returned.

    Returns:
      Positions int32 `[batch, min(count, length)]`, and bool of the same shape. The latter is False for entries that
      exceed the number of real tokens: these point to padding, and the caller must mask them.
    """

    def one(key, mask):
        rank = jnp.maximum(jnp.cumsum(mask) - 1, 0)
        score = jnp.where(mask, jax.random.uniform(key, mask.shape, jnp.float32)[rank], -1.0)
        score, position = jax.lax.top_k(score, min(count, mask.shape[0]))
        return position, score >= 0.0

    return jax.vmap(one)(keys, mask)


def take_tokens(x: jax.Array, position: jax.Array) -> jax.Array:
    """Tokens of `x` `[batch, length, ...]` at positions `[batch, count]`, valid and distinct within an example."""
    return jax.vmap(lambda x, position: x.at[position].get(unique_indices=True, mode="promise_in_bounds"))(x, position)
