"""BigBird (Zaheer et al. 2020, arXiv 2007.14062): softmax over local, global and random blocks of tokens.

Token i sees token j if the block of j is near the block of i, or is drawn for it, or if one of the two blocks is among
the first (global) blocks. Unlike in the paper: only the first blocks are global (the paper's last block moves with the
length, so it has no causal form), and the random blocks are drawn with the example's key, anew in every training step.
Padding is removed first.
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
from efficient_tx.kernels.shapes import check_shapes
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
    """Attends to blocks of real tokens: local blocks, global blocks, which see all, and random blocks.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: draws the random blocks, separately for every head and block of queries: one key per example `[batch]`, or a
        single key, folded per example; None (evaluation) means the same fixed key for every example.
      causal: a query sees no later token. Only then the numbers of queries and keys may differ: the last query is at
        the last real key (decoding).
      block: tokens per block.
      window_blocks: number of local blocks: the query's own block and window_blocks // 2 on each side; causal: the own
        block and window_blocks − 1 before it.
      global_blocks: number of first blocks that see all tokens and are seen by all.
      random_blocks: number of other blocks that are drawn, without replacement; fewer if there are fewer.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at padding. Statistics are float32 at least.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    check_shapes(q, k, v)
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

    def sees(i, j):
        listed = jnp.take_along_axis(blocks, i // block, axis=2)
        met = [listed[..., n : n + 1] == j // block for n in range(listed.shape[-1])]
        return reduce(jnp.logical_or, met, i < global_blocks * block)

    def attend(q):
        *arrays, front = side_by_side(mask, q, k, v)
        out = block_attention(*arrays, blocks=blocks, block_size=block, mask=front, causal=causal)
        if not causal:
            out = with_global_rows(out, *arrays, front, causal, global_blocks * block)
        return spread(out, mask)

    if q.shape[1] != keys:
        return last_queries("bigbird", q, k, v, mask, causal, sees, attend)
    return attend(q)


def bigbird_blocks(key, real, near: Window, heads, blocks, causal, first, random) -> jax.Array:
    """The key blocks of each query block of one example, int32 `[heads, blocks, n]`; `real` blocks hold real tokens."""
    own = jnp.arange(blocks, dtype=jnp.int32)[:, None]
    listed = jnp.asarray(near._replace(everywhere=first).blocks(blocks))
    # Candidates: the blocks from `first` up to the window, and those from `after` on.
    before = jnp.maximum(own - near.before - first, 0)
    after = jnp.maximum(own + near.after + 1, first)
    choices = before + (0 if causal else jnp.maximum(real.astype(jnp.int32) - after, 0))
    # Row i of the draw belongs to block i and does not depend on the number of blocks.
    drawn = distinct(jax.random.uniform(key, (blocks, heads, random), jnp.float32), choices)
    before, after = before[..., None], after[..., None]
    drawn = jnp.where(drawn < 0, -1, jnp.where(drawn < before, first + drawn, after + drawn - before))
    listed = jnp.broadcast_to(listed[:, None], (blocks, heads, listed.shape[-1]))
    return jnp.concatenate([listed, drawn], axis=-1).swapaxes(0, 1)


def distinct(uniform: jax.Array, choices: jax.Array) -> jax.Array:
    """n distinct random numbers below `choices`, from `uniform` `[..., n]`: int32 `[..., n]`, −1 for missing ones.

    All sets are equally likely (Floyd's algorithm; Bentley and Floyd 1987).
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
    """Multi-head `bigbird` attention; options as in `bigbird`, other arguments as in `MultiHead`."""

    paper = "Zaheer et al. 2020, arXiv 2007.14062"
    computes = "softmax over near, first and random blocks, m tokens in all"
    cost = "n·m"
    function = staticmethod(bigbird)
    draws = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"block": max(1, budget // 8)}
