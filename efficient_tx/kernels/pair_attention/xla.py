"""Attention to pairs of tokens, streamed: joint softmax over (j, k), values v_j ⊙ v2_k.

For a fixed second token k it is attention of a combined query (i, k) to all first tokens j:

    s_ijk = a_ik·k_j + b_ik,    Σ_jk e^{s_ijk} v_j ⊙ v2_k = Σ_k v2_k ⊙ e^{b_ik} Σ_j e^{a_ik·k_j} v_j.

A step computes, by matrix products, the scores of a tile of queries with a tile of second tokens and all first tokens
that the queries see. One online softmax combines the steps (Milakov and Gimelshein 2018, arXiv 1805.02867); the
backward pass recomputes a tile. Exponentials are only taken relative to the largest score, so no factor of a product of
exponentials can underflow separately. A CPU takes one head of one example after another, an accelerator all of them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.pair_attention.options import Options, Pair
from efficient_tx.kernels.platform import by_platform
from efficient_tx.numerics.flops import counting

AREA = 1 << 18  # scores per tile: 1 MB of float32
SECOND_TOKENS = 16  # per tile


def unsupported(options: Options, *operands: jax.Array) -> None:
    """It supports everything."""


def sizes(options: Options, q: jax.Array, k: jax.Array, *others: jax.Array) -> "Tiling":
    return Tiling.of(q.shape[1], k.shape[1], options)


class Tiling(NamedTuple):
    """The sizes of a tile of one head: rows of queries, the band of first tokens that they may see, second tokens.

    `together`: all heads take the same steps, also those that one of them could leave out.
    """

    queries: int
    keys: int
    windows: tuple[int, int]
    causal: bool
    rows: int
    band: int
    second: int
    together: bool = False

    @classmethod
    def of(cls, queries: int, keys: int, options: Options) -> "Tiling":
        windows = tuple(keys if window is None else min(window, keys) for window in options.windows)
        second = min(windows[1], SECOND_TOKENS)
        rows = AREA // (second * min(2 * windows[0], keys))
        # The band is `rows` longer than the window.
        rows = max(1, min(rows, queries, max(windows[0], 32)))
        return cls(queries, keys, windows, options.causal, rows, min(keys, rows + windows[0] - 1), second)

    def tiles(self, x: jax.Array) -> jax.Array:
        """`x` `[queries, ...]` as `[tiles, rows, ...]`, padded with zeros."""
        missing = -self.queries % self.rows
        return jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1))).reshape(-1, self.rows, *x.shape[1:])

    def window_start(self, position: jax.Array, count: jax.Array, window: int) -> jax.Array:
        if self.causal:
            return position - window + 1
        return jnp.clip(position - window // 2, 0, jnp.maximum(count - window, 0))

    def seen(self, token: jax.Array, position: jax.Array, start: jax.Array, count: jax.Array, window: int) -> jax.Array:
        inside = (token >= jnp.maximum(start, 0)) & (token < jnp.minimum(start + window, count))
        return inside & (token <= position) if self.causal else inside


class Tile:
    """The scores of one tile of queries.

    Args:
      tiling, pair: tile sizes and pair function of the call.
      number: index of the tile.
      q: `[rows, dim]`.
      head: arrays of the head: k, v, k2, v2 `[keys, dim]`, the number of real keys, and the position of the first
        query.
    """

    def __init__(self, tiling: Tiling, pair: Pair, number: jax.Array, q: jax.Array, head: tuple[jax.Array, ...]):
        self.tiling, self.pair, self.q = tiling, pair, q
        k, v, self.k2, self.v2, self.count, first = head
        self.position = (first + number * tiling.rows + jnp.arange(tiling.rows))[:, None]
        start, self.start2 = (tiling.window_start(self.position, self.count, window) for window in tiling.windows)
        self.begin = jnp.clip(start[0, 0], 0, tiling.keys - tiling.band)
        self.k, self.v = (jax.lax.dynamic_slice_in_dim(x, self.begin, tiling.band) for x in (k, v))
        token = self.begin + jnp.arange(tiling.band)
        self.seen = tiling.seen(token, self.position, start, self.count, tiling.windows[0])

    def for_second_tokens(self, body, carry):
        """Runs `body(scores, second, carry)` over tiles of second tokens, scores `[rows, second tokens, band]`."""
        tiling = self.tiling

        def step(number, carry):
            token = self.start2 + number * tiling.second + jnp.arange(tiling.second)
            seen = tiling.seen(token, self.position, self.start2, self.count, tiling.windows[1])
            k2, v2 = (x.at[token].get(mode="clip") for x in (self.k2, self.v2))
            a, b = self.pair(self.q[:, None], k2)
            scores = rows_dot(a, self.k.T) + b[..., None]
            scores = jnp.where(self.seen[:, None] & seen[..., None], scores, -jnp.inf)
            return body(scores, Second(token, k2, v2, a), carry)

        steps = -(-tiling.windows[1] // tiling.second)
        # No query sees tokens before the first one.
        first = 0 if tiling.together or counting.value else jnp.clip(-self.start2[-1, 0] // tiling.second, 0, steps)
        return jax.lax.fori_loop(first, steps, step, carry)


class Second(NamedTuple):
    """Second tokens `[rows, second tokens, ...]`: indices, keys, values, and the factor of the first tokens."""

    token: jax.Array
    k2: jax.Array
    v2: jax.Array
    a: jax.Array


def in_turn(head: Callable, operands: tuple) -> tuple[jax.Array, ...]:
    return jax.lax.map(head, operands)


def at_once(head: Callable, operands: tuple) -> tuple[jax.Array, ...]:
    return jax.vmap(head)(operands)


def forward(options: Options, tiling: Tiling, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output `[heads, queries, v_dim]` and log-sum-exp `[heads, queries]`, 0 for a query without keys.

    The operands are q, k, v, k2, v2 `[heads, length, dim]`, with heads over batch and heads, and two int32 arrays
    `[heads]`: the number of real tokens, which come first, and the position of the first query.
    """
    alternatives = {
        "cpu": partial(_forward, in_turn, options.pair, tiling),
        "default": partial(_forward, at_once, options.pair, tiling._replace(together=True)),
    }
    return by_platform(alternatives, *operands)


def _forward(each: Callable, pair: Pair, tiling: Tiling, *operands: jax.Array) -> tuple[jax.Array, jax.Array]:
    def head(operands):
        q, *others = operands
        v_dim = others[1].shape[-1]

        def tile(operands):
            one = Tile(tiling, pair, *operands, others)

            def see(scores, second, carry):
                out, total, peak = carry
                new_peak = jnp.maximum(peak, scores.max((1, 2)))
                weights, fade = jnp.exp(scores - new_peak[:, None, None]), jnp.exp(peak - new_peak)
                values = (rows_dot(weights, one.v) * second.v2).sum(1)
                return out * fade[:, None] + values, total * fade + weights.sum((1, 2)), new_peak

            out, total = jnp.zeros((tiling.rows, v_dim), q.dtype), jnp.zeros(tiling.rows, q.dtype)
            # Finite, so that scores of only −inf add exp(−inf − peak) = 0, not exp(−inf + inf).
            carry = out, total, jnp.full_like(total, jnp.finfo(q.dtype).min / 2)
            out, total, peak = one.for_second_tokens(see, carry)
            seen = total > 0
            total = jnp.where(seen, total, 1)
            # Also finite for a query without keys, for the backward pass: its scores are −inf.
            return out / total[:, None], jnp.where(seen, jnp.log(total) + peak, 0)

        q = tiling.tiles(q)
        out, lse = jax.lax.map(tile, (jnp.arange(len(q)), q))
        return out.reshape(-1, v_dim)[: tiling.queries], lse.reshape(-1)[: tiling.queries]

    return each(head, operands)


def backward(
    options: Options, tiling: Tiling, operands: tuple[jax.Array, ...], out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
    """Cotangents of q, k, v, k2 and v2, and None for the counts and positions."""
    alternatives = {
        "cpu": partial(_backward, in_turn, options.pair, tiling),
        "default": partial(_backward, at_once, options.pair, tiling._replace(together=True)),
    }
    return *by_platform(alternatives, operands, out, lse, d_out), None, None


def _backward(
    each: Callable, pair: Pair, tiling: Tiling, operands: tuple, out: jax.Array, lse: jax.Array, d_out: jax.Array
) -> tuple[jax.Array, ...]:
    # With the weights p of a query, d_scores = p ⊙ (d_p − delta).
    delta = jnp.sum(out * d_out, axis=-1)

    def head(operands):
        (q, *others), by_query = operands

        def tile(carry, operands):
            number, q, lse, d_out, delta = operands
            one = Tile(tiling, pair, number, q, others)

            def see(scores, second, carry):
                d_q, d_k, d_v, d_k2, d_v2 = carry
                weights = jnp.exp(scores - lse[:, None, None])
                d_values = d_out[:, None] * second.v2
                d_scores = weights * (rows_dot(d_values, one.v.T) - delta[:, None, None])
                _, pull_back = jax.vjp(pair, jnp.broadcast_to(q[:, None], second.k2.shape), second.k2)
                more_q, more_k2 = pull_back((rows_dot(d_scores, one.k), d_scores.sum(-1)))
                return (
                    d_q + more_q.sum(1),
                    d_k + columns_dot(second.a, d_scores),
                    d_v + columns_dot(d_values, weights),
                    d_k2.at[second.token].add(more_k2),
                    d_v2.at[second.token].add(d_out[:, None] * rows_dot(weights, one.v)),
                )

            d_k, d_v, *d_second = carry
            band = tuple(jax.lax.dynamic_slice_in_dim(x, one.begin, tiling.band, 1) for x in (d_k, d_v))
            d_q, *band, d_k2, d_v2 = one.for_second_tokens(see, (jnp.zeros_like(q), *band, *d_second))
            d_k, d_v = (jax.lax.dynamic_update_slice_in_dim(x, y, one.begin, 1) for x, y in zip((d_k, d_v), band))
            return (d_k, d_v, d_k2, d_v2), d_q

        k, v, k2, v2, *_ = others
        # Sums for k and v as [dim, keys]: XLA's CPU backend is slow if the left factor is transposed and large.
        carry = jnp.zeros_like(k.T), jnp.zeros_like(v.T), jnp.zeros_like(k2), jnp.zeros_like(v2)
        tiles = [tiling.tiles(x) for x in (q, *by_query)]
        carry, d_q = jax.lax.scan(tile, carry, (jnp.arange(len(tiles[0])), *tiles))
        d_k, d_v, d_k2, d_v2 = jax.lax.optimization_barrier(carry)
        return d_q.reshape(-1, q.shape[1])[: tiling.queries], d_k.T, d_v.T, d_k2, d_v2

    return each(head, (operands, (lse, d_out, delta)))


def rows_dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[rows, second tokens, m]` times `[m, n]`."""
    return dot(x.reshape(-1, x.shape[-1]), y).reshape(*x.shape[:2], -1)


def columns_dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[rows, second tokens, m]` and `[rows, second tokens, n]` contracted over rows and second tokens: `[m, n]`."""
    return dot(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]))


def dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
