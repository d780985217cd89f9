"""Who sees whom under a block pattern, which blocks that needs, and attention by it.

A pattern is called with the ranks of queries and keys among the real tokens and says, pair by pair, who meets; its
`attend` takes `[batch, length, heads, dim]` with the real tokens in front and computes the blocks that have such pairs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.kernels import block_attention

# Larger ones waste more at the edges of a window than they save.
LARGEST_BLOCK = 128


class Window(NamedTuple):
    """Sees what is at most `before` earlier or `after` later; what is `everywhere` first sees and is seen by all."""

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
        """What each of `blocks` blocks of `size` tokens has to list, int32 `[blocks, n]`: the first ones, the near."""
        own = np.arange(blocks)[:, None]
        low, high = (-(-min(reach, blocks * size) // size) for reach in (self.before, self.after))
        first, near = np.arange(min(-(-self.everywhere // size), blocks)), own + np.arange(-low, high + 1)
        first = np.where((first < own - low) | (first > own + high), first, -1)
        near = np.where((near >= 0) & (near < blocks), near, -1)
        return np.concatenate([first, near], axis=1).astype(np.int32)

    def attend(self, q, k, v, mask, causal, **options):
        """Attention by this pattern; blocks of half its reach waste little and are not too small."""
        reach = min(max(self.before, self.after), q.shape[1])
        size = min(LARGEST_BLOCK, 16 * -(-reach // 32) or 16)
        blocks = self.blocks(-(-q.shape[1] // size), size)[None, None]
        return block_attention(
            q, k, v, blocks=blocks, block_size=size, mask=mask, causal=causal, visible=self, **options
        )


class Strided(NamedTuple):
    """Sees the window, and what is a multiple of the stride away."""

    stride: int
    near: Window

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return self.near(i, j) | ((i - j) % self.stride == 0)

    def attend(self, q, k, v, mask, causal):
        """Attention over the window without the token itself, merged with that over the token's multiples."""
        (batch, length), stride, dtype = k.shape[:2], self.stride, q.dtype
        q = q.astype(jnp.promote_types(dtype, jnp.float32))
        near = self.near._replace(itself=False).attend(q, k, v, mask, causal, return_lse=True)
        mask = jnp.ones((batch, length), bool) if mask is None else mask
        # Tokens of one remainder side by side, filled up to whole blocks: attention within a remainder.
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
    """Sees the token's own block, and the end of every block."""

    stride: int
    summary: int

    def __call__(self, i: jax.Array, j: jax.Array) -> jax.Array:
        return (i // self.stride == j // self.stride) | (j % self.stride >= self.stride - self.summary)

    def attend(self, q, k, v, mask, causal):
        """Attention over the token's own block, merged with that over the ends of the others."""
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
    """Of the ends of blocks, `summary` each, sees those of other blocks than the query's; causal: of earlier ones."""

    stride: int
    summary: int
    causal: bool

    def __call__(self, i: jax.Array, end: jax.Array) -> jax.Array:
        own, block = i // self.stride, end // self.summary
        return block < own if self.causal else block != own


def merge(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Attention over two disjoint sets of keys, from (output, log-sum-exp) over each."""
    peak = jax.lax.stop_gradient(jnp.maximum(one[1], other[1]))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = [jnp.exp(lse - peak)[..., None] for _, lse in (one, other)]
    total = sum(weights)
    return (weights[0] * one[0] + weights[1] * other[0]) / jnp.where(total > 0, total, 1)


def bigbird_blocks(key, real, near: Window, heads, blocks, causal, first, random) -> jax.Array:
    """The key blocks of one example's query blocks, int32 `[heads, blocks, n]`, of which `real` hold real tokens."""
    own = jnp.arange(blocks, dtype=jnp.int32)[:, None]
    listed = jnp.asarray(near._replace(everywhere=first).blocks(blocks))
    # To draw from: the blocks from `first` up to the window, and those from `after` on.
    before = jnp.maximum(own - near.before - first, 0)
    after = jnp.maximum(own + near.after + 1, first)
    choices = before + (0 if causal else jnp.maximum(real.astype(jnp.int32) - after, 0))
    # The rows belong to the blocks' numbers: they do not depend on how many there are.
    drawn = distinct(jax.random.uniform(key, (blocks, heads, random), jnp.float32), choices)
    before, after = before[..., None], after[..., None]
    drawn = jnp.where(drawn < 0, -1, jnp.where(drawn < before, first + drawn, after + drawn - before))
    listed = jnp.broadcast_to(listed[:, None], (blocks, heads, listed.shape[-1]))
    return jnp.concatenate([listed, drawn], axis=-1).swapaxes(0, 1)


def distinct(uniform: jax.Array, choices: jax.Array) -> jax.Array:
    """As many different numbers below `choices` as `uniform` `[..., n]` has, int32, −1 for what there is not.

    Every set is as likely as any other (Floyd's algorithm; Bentley and Floyd 1987).
    """
    n = uniform.shape[-1]
    chosen = jnp.full(uniform.shape, -1, jnp.int32)
    for t in range(n):
        last = choices - n + t
        drawn = jnp.minimum((uniform[..., t] * (last + 1)).astype(jnp.int32), last)
        drawn = jnp.where((drawn[..., None] == chosen).any(-1), last, drawn)
        chosen = chosen.at[..., t].set(jnp.where(last >= 0, drawn, -1))
    return chosen
