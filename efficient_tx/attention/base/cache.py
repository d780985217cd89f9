"""A decoder's cache: the projected tokens that a later query needs, in slots that are used again where it needs few.

Token t of a projection of which the first F and the last W tokens are needed lies in slot t if t < F, else in slot
F + (t − F) mod W. So the cache of a window does not grow.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.tokens.mask import over


class Needed(NamedTuple):
    """Which tokens a query needs: the `first` ones and the `last` ones, its own included; None: all."""

    first: int = 0
    last: int | None = None

    def slots(self, length: int | None) -> int:
        """The number of slots for `length` tokens; None: for any number, where `last` is one."""
        if self.last is None:
            return length
        return self.first + self.last if length is None else min(length, self.first + self.last)

    def slot(self, t: jax.Array) -> jax.Array:
        """The slot of token `t`."""
        return t if self.last is None else jnp.where(t < self.first, t, self.first + (t - self.first) % self.last)

    def tokens(self, slots: int, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The tokens in a cache after `count` `[batch]` tokens, oldest first; and which of them there are.

        Returns:
          Numbers of tokens, int32, and bool, `[batch, slots]`.
        """
        t, count = jnp.arange(slots), count[:, None]
        if self.last is None:
            t = jnp.broadcast_to(t, (len(count), slots))
            return t, t < count
        latest = jnp.maximum(count, slots) - slots + t
        t = jnp.where(t < self.first, t, latest)
        return t, t < count


def append(needed: Needed, cache: jax.Array, tokens: jax.Array, count: jax.Array, new: jax.Array | None) -> jax.Array:
    """The cache after more tokens.

    Args:
      needed: what it holds.
      cache: `[batch, slots, ...]`.
      tokens: `[batch, length, ...]`, the real ones first.
      count: number of tokens before these, `[batch]`.
      new: number of real ones among these, `[batch]`; None: all.
    """
    slots, length = cache.shape[1], tokens.shape[1]
    tokens = tokens.astype(cache.dtype)
    if length == 1 and new is None:
        return cache.at[jnp.arange(len(cache)), needed.slot(count)].set(tokens[:, 0])
    new = jnp.full_like(count, length) if new is None else new
    # What lies in each slot afterwards, and whether it is one of these tokens.
    t, there = needed.tokens(slots, count + new)
    rank = t - count[:, None]
    fresh = there & (rank >= 0)
    rank = jnp.clip(rank, 0, length - 1)
    taken = jnp.take_along_axis(tokens, rank.reshape(*rank.shape, *(1,) * (tokens.ndim - 2)), axis=1)
    at = (jnp.arange(len(cache))[:, None], needed.slot(t))
    return cache.at[at].set(jnp.where(over(fresh, taken), taken, cache[at]))


def room(stored: Mapping[str, Needed], caches: Mapping[str, jax.Array]) -> int | None:
    """The largest number of tokens, or None if there is none."""
    grows = [caches[name].shape[1] for name, needed in stored.items() if needed.last is None]
    limited = [
        caches[name].shape[1] for name, needed in stored.items()
        if needed.last is not None and caches[name].shape[1] < needed.first + needed.last
    ]  # fmt: skip
    return min(grows + limited, default=None)


def views(
    stored: Mapping[str, Needed], caches: Mapping[str, jax.Array], count: jax.Array
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The tokens of all caches after `count` `[batch]` tokens, oldest first, with as many slots each.

    A projection of which fewer tokens are needed has zeros before them.

    Returns:
      `[batch, slots, ...]` by name, and bool `[batch, slots]`: which tokens there are.
    """
    found = {name: in_order(needed, caches[name], count) for name, needed in stored.items()}
    slots = max(x.shape[1] for x, _ in found.values())
    padded = {
        name: jnp.pad(x, ((0, 0), (slots - x.shape[1], 0), *((0, 0),) * (x.ndim - 2))) for name, (x, _) in found.items()
    }
    return padded, next(there for x, there in found.values() if x.shape[1] == slots)


def moved(x: jax.Array, by: jax.Array | None) -> jax.Array:
    """`x` `[batch, length, ...]` with each example's tokens moved back by `by` `[batch]` places, around the end."""
    if by is None:
        return x
    at = (jnp.arange(x.shape[1]) - by[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 2)), axis=1)


def in_order(needed: Needed, cache: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The tokens of a cache after `count` `[batch]` tokens, oldest first, and bool `[batch, slots]`: which exist."""
    t, there = needed.tokens(cache.shape[1], count)
    if needed.last is None:
        return cache, there
    return cache[jnp.arange(len(cache))[:, None], needed.slot(t)], there
