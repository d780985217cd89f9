"""BigBird (Zaheer et al. 2020, arXiv 2007.14062): softmax over near, first and random blocks of tokens.

The block of a token j is near that of i, or drawn for it, or one of the two is among the first. Unlike in the paper the
global blocks are the first ones only (its last block moves with the length, so it has no causal form), and the random
blocks are drawn with the example's key, anew in every training step. Padding is taken out first.
"""

from functools import reduce

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.block_sparse.mixer import BlockSparse
from efficient_tx.attention.block_sparse.patterns import (
    Window,
    last_queries,
    side_by_side,
    with_global_rows,
)
from efficient_tx.checks import at_least
from efficient_tx.kernels import block_attention
from efficient_tx.numerics.random import evaluation_keys, example_keys
from efficient_tx.tokens.mask import key_mask, spread


def check_options(*, block, window_blocks, global_blocks, random_blocks):
    """Raises ValueError, one line, for the first option that is out of its range."""
    at_least(1, block=block, window_blocks=window_blocks)
    at_least(0, global_blocks=global_blocks, random_blocks=random_blocks)


@checked_by(check_options)
def bigbird(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    block: int = 64, window_blocks: int = 3, global_blocks: int = 2, random_blocks: int = 3,
) -> jax.Array:  # fmt: skip
    """Attends by blocks of real tokens: near ones, the first ones, which see all, and random ones.

    Args:
      q, k, v, mask, causal: as in `local`.
      key: draws the random blocks, other ones for every head and block of queries: one key per example `[batch]`, or
        one, folded per example; None (evaluation) draws every example's with the same fixed key.
      block: tokens in a block.
      window_blocks: how many blocks are near: the query's own and as many on both sides; causal: before it.
      global_blocks: how many of the first blocks see all and are seen by all.
      random_blocks: how many of the other blocks are drawn, without replacement; fewer where there are fewer.

    Returns, Raises: as `local`.
    """
    batch, keys = k.shape[:2]
    mask = key_mask(mask, batch, keys)
    draws = evaluation_keys(batch) if key is None else example_keys(key, batch)
    near = Window.of(window_blocks, causal)
    real = jnp.full(batch, keys) if mask is None else mask.sum(1)
    blocks = jax.vmap(
        lambda draw, real: bigbird_blocks(
            draw, -(-real // block), near, q.shape[2], -(-keys // block), causal, global_blocks, random_blocks
        )
    )(draws, real)

    if q.shape[1] != keys:

        def sees(i, j):
            listed = jnp.take_along_axis(blocks, i // block, axis=2)
            met = [listed[..., n : n + 1] == j // block for n in range(listed.shape[-1])]
            return reduce(jnp.logical_or, met, i < global_blocks * block)

        return last_queries("bigbird", q, k, v, mask, causal, sees)
    *arrays, front = side_by_side(mask, q, k, v)
    out = block_attention(*arrays, blocks=blocks, block_size=block, mask=front, causal=causal)
    if not causal:
        out = with_global_rows(out, *arrays, front, causal, global_blocks * block)
    return spread(out, mask)


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


class BigBird(BlockSparse):
    """Multi-head `bigbird` attention; options as the function, the other arguments as `MultiHead`."""

    paper = "Zaheer et al. 2020, arXiv 2007.14062"
    computes = "softmax over near, first and random blocks, m tokens in all"
    cost = "n·m"
    function = staticmethod(bigbird)
    draws = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"block": max(1, budget // 8)}
