"""Sparsity patterns: which query sees which key, the blocks that this needs, and attention with them.

A pattern is a function of the ranks of queries and keys among the real tokens; it tells for each pair whether the query
sees the key. Its `attend` takes `[batch, length, heads, dim]` with the real tokens first and computes the blocks that
contain such pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.kernels import block_attention, flash_attention
from efficient_tx.tokens.mask import as_last, compact, token_ranks

# Part of the error message for different numbers of queries and keys without `causal`.
OTHER_QUERIES = "other numbers need the plain causal form"
# Larger blocks waste more at the edges of a window than they save.
LARGEST_BLOCK = 128


class Window(NamedTuple):
    """Sees keys at most `before` earlier or `after` later; the first `everywhere` tokens see and are seen by all."""

    before: int
    after: int
    everywhere: int = 0
    itself: bool = True

    @classmethod
    def of(cls, size: int, causal: bool, everywhere: int = 0) -> "Window":
        return cls(size - 1, 0, everywhere) if causal else cls(size // 2, size // 2, everywhere)

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array:
        near = (i - j <= self.before) & (j - i <= self.after)
        near = near if self.itself else near & (i != j)
        return near | (i < self.everywhere) | (j < self.everywhere) if self.everywhere else near

    def blocks(self, blocks: int, size: int = 1) -> np.ndarray:
        """The key blocks of each of `blocks` query blocks of `size` tokens, int32 `[blocks, n]`: global, then near."""
        own = np.arange(blocks)[:, None]
        low, high = (-(-min(reach, blocks * size) // size) for reach in (self.before, self.after))
        first, near = np.arange(min(-(-self.everywhere // size), blocks)), own + np.arange(-low, high + 1)
        first = np.where((first < own - low) | (first > own + high), first, -1)
        near = np.where((near >= 0) & (near < blocks), near, -1)
        return np.concatenate([first, near], axis=1).astype(np.int32)

    def attend(self, q, k, v, mask, causal, **options):
        """Attention with this pattern; blocks of half the window's reach waste little and are not too small."""
        reach = min(max(self.before, self.after), q.shape[1])
        size = min(LARGEST_BLOCK, 16 * -(-reach // 32) or 16)
        blocks = self.blocks(-(-q.shape[1] // size), size)[None, None]
        return block_attention(
            q, k, v, blocks=blocks, block_size=size, mask=mask, causal=causal, visible=self, **options
        )


class Strided(NamedTuple):
    """Sees the window, and the keys at a multiple of the stride."""

    stride: int
    near: Window

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return self.near(i, j) | ((i - j) % self.stride == 0)

    def attend(self, q, k, v, mask, causal):
        """Attention to the window without the token itself, merged with that to the keys at multiples of the stride."""
        (batch, length), stride, dtype = k.shape[:2], self.stride, q.dtype
        q = q.astype(jnp.promote_types(dtype, jnp.float32))
        near = self.near._replace(itself=False).attend(q, k, v, mask, causal, return_lse=True)
        mask = jnp.ones((batch, length), bool) if mask is None else mask
        # Tokens with equal position mod stride are grouped and padded to whole blocks; attention is within a group.
        each = -(-length // stride)
        count = -(-each // LARGEST_BLOCK)
        size = -(-each // count)

        def by_remainder(x):
            x = jnp.pad(x, ((0, 0), (0, size * count * stride - length), *((0, 0),) * (x.ndim - 2)))
            return x.reshape(batch, size * count, stride, *x.shape[2:]).swapaxes(1, 2).reshape(x.shape)

        def back(x):
            x = x.reshape(batch, stride, size * count, *x.shape[2:]).swapaxes(1, 2)
            return x.reshape(batch, -1, *x.shape[3:])[:, :length]

        blocks = np.arange(stride * count, dtype=np.int32)[:, None] // count * count + np.arange(count, dtype=np.int32)
        found = block_attention(
            *(by_remainder(x) for x in (q, k, v)), blocks=blocks[None, None], block_size=size,
            mask=by_remainder(mask), causal=causal, return_lse=True,
        )  # fmt: skip
        return merge(near, tuple(back(x) for x in found)).astype(dtype)


class Fixed(NamedTuple):
    """Sees the query's own block, and the last `summary` tokens of every block."""

    stride: int
    summary: int

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return (i // self.stride == j // self.stride) | (j % self.stride >= self.stride - self.summary)

    def attend(self, q, k, v, mask, causal):
        """Attention to the token's own block, merged with attention to the ends of the other blocks."""
        (batch, length), dtype = k.shape[:2], q.dtype
        q = q.astype(jnp.promote_types(dtype, jnp.float32))
        mask = jnp.ones((batch, length), bool) if mask is None else mask
        count = -(-length // self.stride)
        own = np.arange(count, dtype=np.int32)[:, None]
        options = {"block_size": self.stride, "return_lse": True}
        inside = block_attention(q, k, v, blocks=own[None, None], mask=mask, causal=causal, **options)

        def ends(x):
            x = jnp.pad(x, ((0, 0), (0, count * self.stride - length), *((0, 0),) * (x.ndim - 2)))
            x = x.reshape(batch, count, self.stride, *x.shape[2:])[:, :, self.stride - self.summary :]
            return x.reshape(batch, -1, *x.shape[3:])

        every = np.arange(-(-count * self.summary // self.stride), dtype=np.int32)
        needed = (every * self.stride // self.summary < own) | (not causal)
        others = block_attention(
            q, *(ends(x) for x in (k, v)), blocks=np.where(needed, every, -1)[None, None], mask=ends(mask),
            visible=Elsewhere(self.stride, self.summary, causal), **options,
        )  # fmt: skip
        return merge(inside, others).astype(dtype)


class Elsewhere(NamedTuple):
    """Sees the ends, `summary` tokens each, of all blocks but the query's own; causal: of earlier blocks only."""

    stride: int
    summary: int
    causal: bool

    def __call__(self, i: jax.Array, end: jax.Array) -> jax.Array:
        # Positions are not negative, and the operator // takes more than TPU kernels have.
        own, block = (jax.lax.div(x, jnp.full_like(x, n)) for x, n in ((i, self.stride), (end, self.summary)))
        return block < own if self.causal else block != own


def merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Attention over the union of two disjoint sets of keys, from the (output, log-sum-exp) of each."""
    peak = jax.lax.stop_gradient(jnp.maximum(one[1], other[1]))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = [jnp.exp(lse - peak)[..., None] for _, lse in (one, other)]
    total = sum(weights)
    return (weights[0] * one[0] + weights[1] * other[0]) / jnp.where(total > 0, total, 1)


def side_by_side(mask: jax.Array | None, *arrays: jax.Array) -> tuple[jax.Array | None, ...]:
    """The arrays and the mask after `compact`."""
    return *(compact(x, mask) for x in arrays), None if mask is None else compact(mask, mask)


def last_queries(name, q, k, v, mask, causal, sees, attend) -> jax.Array:
    """Causal attention of other numbers of queries than keys; the last query is at the position of the last real key.

    Args:
      sees: the pattern, `(i, j) -> bool`, for one query; so a decoder's step costs no more than its keys.
      attend: `(q) -> output` with as many queries as keys: several queries are put there, so that memory is linear.
    """
    (batch, queries), keys = q.shape[:2], k.shape[1]
    if not causal:
        raise ValueError(f"{name} got {queries} queries and {keys} keys: {OTHER_QUERIES}")
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    if queries > 1:
        return as_last(attend, q, real)
    i = (real.sum(1, keepdims=True) - 1)[:, None, :, None]
    j = token_ranks(mask, batch, keys)[:, None, None, :]
    k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    return flash_attention(q, k, v, mask=sees(i, j) & (j <= i) & real[:, None, None, :])


def with_global_rows(out, q, k, v, mask, causal, count) -> jax.Array:
    """`out` with its first `count` rows replaced by exact attention to all keys; causal: to no later keys."""
    if count == 0:
        return out
    if causal:
        k, v, mask = (x if x is None else x[:, :count] for x in (k, v, mask))
    rows = flash_attention(q[:, :count], k, v, mask=mask, causal=causal)
    return jnp.concatenate([rows, out[:, count:]], axis=1)
