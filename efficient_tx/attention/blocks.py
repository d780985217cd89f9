"""Block patterns: softmax attention in which a query meets some of the keys, listed by block before any is computed.

With i and j the ranks of two real tokens (padding, wherever it stands, is taken out first), i sees j where

    local       |i − j| ≤ ⌊window / 2⌋                                 (Parmar et al. 2018, arXiv 1802.05751)
    longformer  as local, or i or j is among the first `global_tokens`   (Beltagy et al. 2020, arXiv 2004.05150)
    bigbird     j's block is near i's, or drawn for it, or one of the two is among the first (Zaheer et al. 2020,
                arXiv 2007.14062)
    sparse      |i − j| ≤ ⌊stride / 2⌋, or stride divides i − j         (Child et al. 2019, arXiv 1904.10509)
                or, "fixed": ⌊i / stride⌋ = ⌊j / stride⌋, or j mod stride ≥ stride − summary

and causal forms see j ≤ i of these, with the window before the query. All are exact softmax when they see everything.

Unlike the published code of Long Range Arena: local attention is local, not strided; nothing is causal that was not
asked to be; no pattern is a dense mask; padding is neither near nor far. Unlike the papers: BigBird's global blocks are
the first ones only (its last block moves with the length, so it has no causal form), and its random blocks are drawn
with the example's key, anew in every training step; Sparse Transformer's two patterns share every head ("merged").
"""

from functools import reduce
from typing import ClassVar

import jax
import jax.numpy as jnp

from efficient_tx.attention.block_patterns import Fixed, Strided, Window, bigbird_blocks
from efficient_tx.attention.multihead import MultiHead
from efficient_tx.attention.shapes import compact, key_mask, spread, token_ranks
from efficient_tx.attention.softmax import softmax
from efficient_tx.kernels import block_attention, flash_attention
from efficient_tx.numerics.random import evaluation_keys, example_keys
from efficient_tx.sizes import at_least


def local(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False, window: int = 128,
) -> jax.Array:  # fmt: skip
    """Attends to the real tokens at most window // 2 away; causal: to the last `window` ones, the query's included.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; it marks the queries too.
      key: unused, the method draws nothing.
      causal: a query sees no later token. Then there may be other numbers of queries and keys: the last query stands
        at the last real key (decoding), and time and memory are queries × keys.
      window: how many tokens are near.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at padding. Statistics are float32 at least.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    at_least(1, window=window)
    near = Window.of(window, causal)
    mask = key_mask(mask, *k.shape[:2])
    if q.shape[1] != k.shape[1]:
        return last_queries("local", q, k, v, mask, causal, near)
    return spread(near.attend(*side_by_side(mask, q, k, v), causal), mask)


def longformer(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    q_global: jax.Array | None = None, k_global: jax.Array | None = None, v_global: jax.Array | None = None,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    window: int = 512, global_tokens: int = 1,
) -> jax.Array:  # fmt: skip
    """`local`, and the first `global_tokens` real tokens see all and are seen by all.

    Args:
      q, k, v, mask, key, causal, window: as in `local`.
      q_global, k_global, v_global: another projection of the same tokens, each of the shape of q, k or v: with it the
        global tokens look at all others, as in the paper. None: with q, k and v.
      global_tokens: how many; 0 is `local`.

    Returns, Raises: as `local`; with the other projection, queries and keys must be equally many.
    """
    at_least(1, window=window)
    at_least(0, global_tokens=global_tokens)
    near = Window.of(window, causal, global_tokens)
    mask = key_mask(mask, *k.shape[:2])
    given = [x for x in (q_global, k_global, v_global) if x is not None]
    if len(given) not in (0, 3):
        raise ValueError(f"longformer got {len(given)} of q_global, k_global and v_global: pass all three or none")
    if q.shape[1] != k.shape[1]:
        return last_queries("longformer", q, k, v, mask, causal and not given, near)
    *arrays, front = side_by_side(mask, q, k, v, *given)
    out = near.attend(*arrays[:3], front, causal)
    if given or not causal:
        out = with_global_rows(out, *arrays[-3:], front, causal, global_tokens)
    return spread(out, mask)


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
    at_least(1, block=block, window_blocks=window_blocks)
    at_least(0, global_blocks=global_blocks, random_blocks=random_blocks)
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


def sparse(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    pattern: str = "strided", stride: int = 128, summary: int = 8,
) -> jax.Array:  # fmt: skip
    """Two sparse patterns that together reach every token in two steps, at n·(stride + n / stride) for stride ~ √n.

    Args:
      q, k, v, mask, key, causal: as in `local`.
      pattern: "strided": `local` with a window of `stride`, and every token a multiple of `stride` away; "fixed": the
        query's own block of `stride` tokens, and the last `summary` tokens of every block.
      stride: the distance, or the length of a block.
      summary: of "fixed", from 1 to `stride`.

    Returns, Raises: as `local`.
    """
    check_sparse(pattern, stride, summary)
    mask = key_mask(mask, *k.shape[:2])
    chosen = Strided(stride, Window.of(stride, causal)) if pattern == "strided" else Fixed(stride, summary)
    if q.shape[1] != k.shape[1]:
        return last_queries("sparse", q, k, v, mask, causal, chosen)
    return spread(chosen.attend(*side_by_side(mask, q, k, v), causal), mask)


def check_sparse(pattern: str, stride: int, summary: int) -> None:
    if pattern not in ("strided", "fixed"):
        raise ValueError(f"pattern is {pattern!r}: it must be 'strided' or 'fixed'")
    at_least(1, stride=stride, summary=summary)
    if pattern == "fixed" and summary > stride:
        raise ValueError(f"summary is {summary}: it must be at most the stride, {stride}")


def side_by_side(mask: jax.Array | None, *arrays: jax.Array) -> tuple[jax.Array | None, ...]:
    """`compact` arrays, and their mask."""
    return *(compact(x, mask) for x in arrays), None if mask is None else compact(mask, mask)


def last_queries(name, q, k, v, mask, causal, sees) -> jax.Array:
    """Causal attention of queries of which the last stands at the last real key, with a dense mask."""
    (batch, queries), keys = q.shape[:2], k.shape[1]
    if not causal:
        raise ValueError(f"{name} got {queries} queries and {keys} keys: other numbers need the plain causal form")
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    i = (real.sum(1, keepdims=True) - queries + jnp.arange(queries))[:, None, :, None]
    j = token_ranks(mask, batch, keys)[:, None, None, :]
    k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    return flash_attention(q, k, v, mask=sees(i, j) & (j <= i) & real[:, None, None, :])


def with_global_rows(out, q, k, v, mask, causal, count) -> jax.Array:
    """`out` with its first `count` rows replaced by exact attention to all keys; causal: to those before them."""
    if count == 0:
        return out
    if causal:
        k, v, mask = (x if x is None else x[:, :count] for x in (k, v, mask))
    rows = flash_attention(q[:, :count], k, v, mask=mask, causal=causal)
    return jnp.concatenate([rows, out[:, count:]], axis=1)


class Local(MultiHead):
    """Multi-head `local` attention.

    Args:
      window: how many tokens are near.
    """

    paper = "Parmar et al. 2018, arXiv 1802.05751"
    computes = "softmax over the w nearest tokens"
    cost = "n·w"
    function = staticmethod(local)
    exact = staticmethod(softmax)

    @staticmethod
    def within(budget):
        return {"window": budget}

    def __init__(self, features: int, *, window: int = 128, **common):
        at_least(1, window=window)
        super().__init__(features, **common)
        self.window = window

    def attend(self, q, k, v, *, mask, key):
        return local(q, k, v, mask=mask, causal=self.causal, window=self.window)


class Longformer(MultiHead):
    """Multi-head `longformer` attention.

    Args:
      window: how many tokens are near.
      global_tokens: how many of the first tokens see all and are seen by all.
      global_projections: global tokens look through query, key and value layers of their own, as in the paper; twice
        the parameters.
    """

    paper = "Beltagy et al. 2020, arXiv 2004.05150"
    computes = "softmax over the w nearest tokens and g global ones"
    cost = "n·(w + g)"
    function = staticmethod(longformer)
    exact = staticmethod(softmax)

    @staticmethod
    def within(budget):
        return {"window": budget}

    def __init__(
        self, features: int, *, window: int = 512, global_tokens: int = 1, global_projections: bool = False, **common
    ):
        at_least(1, window=window)
        at_least(0, global_tokens=global_tokens)
        if global_projections:
            self.projections = ("q", "k", "v", "q_global", "k_global", "v_global")
            self.rotated = ("q", "k", "q_global", "k_global")
        super().__init__(features, **common)
        self.window, self.global_tokens = window, global_tokens

    def attend(self, q, k, v, q_global=None, k_global=None, v_global=None, *, mask, key):
        return longformer(
            q, k, v, q_global=q_global, k_global=k_global, v_global=v_global, mask=mask, causal=self.causal,
            window=self.window, global_tokens=self.global_tokens,
        )  # fmt: skip


class BigBird(MultiHead):
    """Multi-head `bigbird` attention; options as the function."""

    paper = "Zaheer et al. 2020, arXiv 2007.14062"
    computes = "softmax over near, first and random blocks, m tokens in all"
    cost = "n·m"
    function = staticmethod(bigbird)
    exact = staticmethod(softmax)
    samples: ClassVar[bool] = True

    @staticmethod
    def within(budget):
        return {"block": max(1, budget // 8)}

    def __init__(
        self, features: int, *,
        block: int = 64, window_blocks: int = 3, global_blocks: int = 2, random_blocks: int = 3, **common,
    ):  # fmt: skip
        at_least(1, block=block, window_blocks=window_blocks)
        at_least(0, global_blocks=global_blocks, random_blocks=random_blocks)
        super().__init__(features, **common)
        self.block, self.window_blocks = block, window_blocks
        self.global_blocks, self.random_blocks = global_blocks, random_blocks

    def attend(self, q, k, v, *, mask, key):
        return bigbird(
            q, k, v, mask=mask, key=key, causal=self.causal, block=self.block, window_blocks=self.window_blocks,
            global_blocks=self.global_blocks, random_blocks=self.random_blocks,
        )  # fmt: skip


class Sparse(MultiHead):
    """Multi-head `sparse` attention; options as the function."""

    paper = "Child et al. 2019, arXiv 1904.10509"
    computes = "softmax over the l nearest tokens and every l-th one"
    cost = "n·(l + n/l)"
    function = staticmethod(sparse)
    exact = staticmethod(softmax)

    @staticmethod
    def within(budget):
        return {"stride": budget}

    def __init__(self, features: int, *, pattern: str = "strided", stride: int = 128, summary: int = 8, **common):
        check_sparse(pattern, stride, summary)
        super().__init__(features, **common)
        self.pattern, self.stride, self.summary = pattern, stride, summary

    def attend(self, q, k, v, *, mask, key):
        return sparse(
            q, k, v, mask=mask, causal=self.causal, pattern=self.pattern, stride=self.stride, summary=self.summary
        )
