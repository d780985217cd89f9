"""Masks, grouped heads and query positions of the pure attention functions: checks and derived arrays."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.numerics.random import take_tokens

WANTED = "pass dtype=bool, True for real tokens"


def bool_mask(mask: jax.Array | None) -> jax.Array | None:
    """A mask of any shape, True for real tokens, as a bool array; None stays None.

    Bools and the integers 0 and 1 say the same in all libraries. Floats do not: added to the logits, 0 marks a real
    token and −1e9 padding, which is the opposite.

    Raises:
      ValueError: the mask is of floats; or of integers, one of which is neither 0 nor 1 (seen unless traced).
    """
    if mask is None:
        return None
    if not isinstance(mask, jax.Array):
        mask = np.asarray(mask)
    if mask.dtype == bool:
        return jnp.asarray(mask)
    if not jnp.issubdtype(mask.dtype, jnp.integer):
        raise ValueError(f"mask has dtype {mask.dtype}, as one that is added to logits: {WANTED}")
    if not zeros_and_ones(mask):
        raise ValueError(f"mask has dtype {mask.dtype} and values besides 0 and 1: {WANTED}")
    return jnp.asarray(mask) != 0


def zeros_and_ones(mask: jax.Array) -> bool:
    """Whether all values are 0 or 1; True for a traced array, whose values are not known."""
    return isinstance(mask, jax.core.Tracer) or bool(((mask == 0) | (mask == 1)).all())


def joined(mask: jax.Array | None, mask2: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    """The masks of the two texts of a pair, each of this shape or None, as one of both, the first ones first.

    None means that all tokens are real.
    """
    if mask is None and mask2 is None:
        return None
    return jnp.concatenate([jnp.ones(shape, bool) if one is None else bool_mask(one) for one in (mask, mask2)])


def key_mask(mask: jax.Array | None, batch: int, length: int) -> jax.Array | None:
    """The key mask as bool `[batch, length]`, from `[batch, length]` or `[batch, 1, 1, length]`; None stays None.

    Raises:
      ValueError: the mask has another shape, for example a full `[batch, heads, length, length]` mask, or another dtype
        than `bool_mask` takes.
    """
    mask = bool_mask(mask)
    if mask is None:
        return None
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0, :]
    if mask.ndim != 2 or mask.shape[1] != length or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"mask has shape {mask.shape}: pass the key mask [B, 1, 1, L] instead of make_attention_mask(m, m)"
            f" (here ({batch}, 1, 1, {length}) or ({batch}, {length}))"
        )
    return jnp.broadcast_to(mask, (batch, length))


def key_mask_or_pairs(mask: jax.Array | None, q: jax.Array, k: jax.Array) -> jax.Array | None:
    """The mask of a dense method: a key mask as in `key_mask`, or a mask of all query-key pairs.

    The latter is bool `[batch or 1, heads or 1, queries, keys]`, as from `flax.nnx.make_attention_mask`. Its memory is
    quadratic in the length.
    """
    mask = bool_mask(mask)
    full = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if mask is not None and mask.ndim == 4 and mask.shape[1:3] != (1, 1):
        if all(size in (1, whole) for size, whole in zip(mask.shape, full)):
            return mask
        raise ValueError(f"mask has shape {mask.shape}: pass [batch or 1, heads or 1, queries, keys], here {full}")
    return key_mask(mask, k.shape[0], k.shape[1])


def token_ranks(mask: jax.Array | None, batch: int, length: int) -> jax.Array:
    """Each token's rank among the real tokens of its example, int32 `[batch, length]`; 0 before the first of them."""
    mask = bool_mask(mask)
    if mask is None:
        return jnp.broadcast_to(jnp.arange(length), (batch, length))
    return jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)


def repeat_heads(x: jax.Array, heads: int, name: str) -> jax.Array:
    """Grouped heads `[batch, length, groups, dim]` repeated to `[batch, length, heads, dim]`.

    Raises:
      ValueError: the number of query heads is no multiple of the number of groups.
    """
    groups = x.shape[2]
    if heads % groups:
        raise ValueError(f"{name} has {groups} heads: the {heads} query heads are no multiple of it")
    return x if groups == heads else jnp.repeat(x, heads // groups, axis=2)


def compact(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """`x` `[batch, length, ...]` with the real tokens first, in their order, and zeros after them.

    Methods that weight a token by its position compute on this, so padding at any place has no effect.
    """
    mask = bool_mask(mask)
    if mask is None:
        return x
    place = places(mask)
    order = jax.vmap(lambda place: jnp.zeros_like(place).at[place].set(jnp.arange(len(place)), unique_indices=True))
    return take_tokens(jnp.where(over(mask, x), x, jnp.zeros((), x.dtype)), order(place))


def spread(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The inverse of `compact`: each real token gets the entry at its rank; padding gets zero."""
    mask = bool_mask(mask)
    return x if mask is None else jnp.where(over(mask, x), take_tokens(x, places(mask)), 0)


def places(mask: jax.Array) -> jax.Array:
    """The index to which `compact` moves each token, int32 `[batch, length]`: real tokens first, then padding."""
    return jnp.where(mask, jnp.cumsum(mask, 1), mask.sum(1, keepdims=True) + jnp.cumsum(~mask, 1)) - 1


def over(mask: jax.Array, x: jax.Array) -> jax.Array:
    """`mask` `[batch, length]` with axes of size 1 appended, to broadcast against `x` `[batch, length, ...]`."""
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - 2))


def query_positions(real: jax.Array, queries: int) -> tuple[jax.Array, jax.Array]:
    """Positions of queries that are not the keys' tokens: the last one at the last real key, the others before it.

    Args:
      real: bool `[batch, keys]`.
      queries: number of queries.

    Returns:
      Two arrays `[batch, queries]`: the position of the query's key, int32, and whether this key exists, bool. A query
      before all keys sees none.
    """
    rank = real.sum(axis=1, keepdims=True) - queries + jnp.arange(queries)
    order = compact(jnp.broadcast_to(jnp.arange(real.shape[1]), real.shape), real)
    return jnp.take_along_axis(at_least_one(order), jnp.maximum(rank, 0), axis=1), rank >= 0


def as_last(attend: Callable[[jax.Array], jax.Array], q: jax.Array, real: jax.Array) -> jax.Array:
    """Attends with queries `[batch, queries, ...]` that stand as `query_positions` says.

    Args:
      attend: the attention of as many queries as keys, `[batch, keys, ...]` -> the same.
      q: the queries.
      real: bool `[batch, keys]`.
    """
    at = query_positions(real, q.shape[1])
    return take(attend(place(q, at, real.shape[1])), at)


def place(x: jax.Array, at: tuple[jax.Array, jax.Array], keys: int) -> jax.Array:
    """`x` `[batch, queries, ...]` at the positions of `query_positions`, zeros elsewhere: `[batch, keys, ...]`."""
    position, seen = at
    x = jnp.where(over(seen, x), x, 0)
    return jnp.zeros((x.shape[0], keys, *x.shape[2:]), x.dtype).at[jnp.arange(len(x))[:, None], position].add(x)


def take(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The rows of `x` `[batch, keys, ...]` at the positions of `query_positions`; zero for a query that sees no key."""
    position, seen = at
    x = at_least_one(x)
    return jnp.where(over(seen, x), x[jnp.arange(len(x))[:, None], position], 0)


def at_least_one(x: jax.Array) -> jax.Array:
    """`x` `[batch, keys, ...]`, or zeros of one key if there is none: nothing can be taken of an axis of length 0."""
    return x if x.shape[1] else jnp.zeros((len(x), 1, *x.shape[2:]), x.dtype)
