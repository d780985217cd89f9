"""Blockwise attention in XLA: memory linear in the lengths, forward and backward; blocks that fit a CPU's cache.

A head is processed by blocks of queries with blocks of keys, with the running maximum and sum of online softmax
(Milakov and Gimelshein 2018, arXiv 1805.02867). The backward pass recomputes the weights of a block from the saved
log-sum-exp (Dao et al. 2022, arXiv 2205.14135).

A block of weights is never the transposed left factor of a product, because XLA's CPU backend runs that at a quarter of
the speed. So the cotangents of keys and values are summed as `[dim, keys]`; and queries and cotangents of outputs are
transposed once for them, as folded into the products that costs as much as half of one.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention import block
from efficient_tx.kernels.flash_attention.block import Block
from efficient_tx.kernels.flash_attention.blocks import Sizes, Visits, visits
from efficient_tx.kernels.flash_attention.mask import Mask, Padding
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.flash_attention.score import Score
from efficient_tx.kernels.heads import at_once, in_turn
from efficient_tx.kernels.platform import by_platform

# Queries and keys of a block, the fastest of the sizes tried on two AVX-512 cores. Many queries make long products; but
# a mask that tells queries apart seldom empties a block for all of them.
SQUARE, TALL = (512, 512), (2048, 256)
# Pairs of a block whose keys padding may empty: with fewer, blocks cost more than they skip.
SMALLEST = 2**15
# An accelerator computes a block of all heads of all examples at once; a TPU pads shorter sides to this.
SIDE_AT_ONCE = 128


def unsupported(options: Options, q, k, v, score, mask, pairs) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    return (
        None
        if pairs is None
        else "it takes key masks [batch, keys] and Masks: one of all pairs is quadratic in the length"
    )


def sizes(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, score: Score, mask: Mask | None, *_) -> Sizes:
    def equal_blocks(length, largest):
        count = -(-length // largest)
        return 16 * -(-length // (16 * count))

    queries, keys = q.shape[1], k.shape[1]
    rows, columns = TALL if mask is None or isinstance(mask, Padding) else SQUARE
    area = rows * columns
    # If one side is short, the other is longer; but padding may empty blocks of keys, and the rest are not tested.
    most = SMALLEST if isinstance(mask, Padding) else area
    key_block = equal_blocks(keys, max(columns, most // equal_blocks(queries, rows)))
    return Sizes(queries, keys, equal_blocks(queries, max(rows, area // key_block)), key_block)


def forward(options: Options, sizes: Sizes, *arrays: Any) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
    """(Output, log-sum-exp or None) and for normalise="sum" the sums of weights `[batch, queries, heads]`, else None.

    Arguments as of `reference.forward`.
    """
    alternatives = {
        "cpu": partial(_forward, in_turn, options, sizes),
        "default": partial(_forward, at_once, options, smaller(sizes)),
    }
    return by_platform(alternatives, *arrays)


def backward(
    options: Options, sizes: Sizes, arrays: tuple, outputs: tuple, total: jax.Array | None, cotangents: tuple
) -> tuple:
    """Cotangents of q, k, v and the score."""
    alternatives = {
        "cpu": partial(_backward, in_turn, options, sizes),
        "default": partial(_backward, at_once, options, smaller(sizes)),
    }
    return by_platform(alternatives, arrays, outputs, total, cotangents)


def smaller(sizes: Sizes) -> Sizes:
    return sizes._replace(
        query_block=min(sizes.query_block, SIDE_AT_ONCE), key_block=min(sizes.key_block, SIDE_AT_ONCE)
    )


def _forward(each_head, options, sizes, q, k, v, score, mask, pairs):
    grid = Grid(options, sizes, visits(mask, sizes)[0])
    out_dtype, dtype = q.dtype, wide(q)
    q, k, v = grid.pad_queries(q), grid.pad_keys(k), grid.pad_keys(v)
    q_segments, k_segments = grid.segments(mask)

    def head(example, head, q, k, v):
        one = jax.tree.map(lambda x: x[head], score)
        of = Head(grid, one, mask, head, example, q, k, q_segments, k_segments)

        def softmax(i, j, test, carry):
            out, total, peak = carry
            logits = block.logits(one, of.block(i, j, test))
            new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
            weights, fade = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
            out = out * fade + grid.dot(weights, grid.key_slice(v, j))
            return out, total * fade + weights.sum(-1, keepdims=True), new_peak

        def unnormalised(i, j, test, carry):
            weights = block.weights(one, of.block(i, j, test))
            out, *total = carry
            out += grid.dot(weights, grid.key_slice(v, j))
            return out, *(x + weights.sum(-1, keepdims=True) for x in total)

        def block_of_queries(i):
            out = jnp.zeros((sizes.query_block, v.shape[1]), dtype)
            total = jnp.zeros((sizes.query_block, 1), dtype)
            if score.normalise == "softmax":
                # Finite, so that a block without keys adds exp(−inf − peak) = 0, not exp(−inf + inf).
                peak = jnp.full_like(total, jnp.finfo(dtype).min / 2)
                out, total, peak = of.for_keys(i, softmax, (out, total, peak))
                seen = total > 0
                total = jnp.where(seen, total, 1)
                return (out / total).astype(out_dtype), jnp.where(seen, jnp.log(total) + peak, -jnp.inf)
            if score.normalise is None:
                (out,) = of.for_keys(i, unnormalised, (out,))
                return (out.astype(out_dtype),)
            out, total = of.for_keys(i, unnormalised, (out, total))
            total = jnp.where(total == 0, jnp.inf, total)  # where the weights sum to 0, the output is 0
            return (out / total).astype(out_dtype), total

        found = jax.lax.map(block_of_queries, jnp.arange(grid.query_blocks))
        return tuple(x.reshape(-1, x.shape[-1]) for x in found)

    out, *saved = (x[:, : sizes.queries] for x in each_head(head, q, k, v))
    saved = saved[0][..., 0] if saved else None
    lse, total = (saved, None) if score.normalise == "softmax" else (None, saved)
    return (out, lse), total


def _backward(each_head, options, sizes, arrays, outputs, total, cotangents):
    q, k, v, score, mask, _ = arrays
    dtypes, groups = [x.dtype for x in (q, k, v)], k.shape[2]
    shared = groups < q.shape[2]
    grid = Grid(options, sizes, visits(mask, sizes)[0])
    q, k, v, dtype = grid.pad_queries(q), grid.pad_keys(k), grid.pad_keys(v), wide(q)
    d_out = grid.pad_queries(cotangents[0])
    statistics = block.saved_and_delta(score, outputs, total, cotangents, dtype) or ()
    rows = [grid.pad_queries(x[..., None]) for x in statistics]
    q_segments, k_segments = grid.segments(mask)

    def head(example, head, q, k, v, d_out, *rows):
        one = jax.tree.map(lambda x: x[head], score)
        of = Head(grid, one, mask, head, example, q, k, q_segments, k_segments)
        q_turned, d_out_turned = jax.lax.optimization_barrier((q.T, d_out.T))

        def step(i, j, test, carry):
            d_q, d_q_norm, d_k, d_k_norm, d_v, d_score = carry
            d_i, *rows_i = (grid.query_slice(x, i) for x in (d_out, *rows))
            q_t, d_t = (grid.query_slice(x, i, 1) for x in (q_turned, d_out_turned))
            saved, delta = rows_i or (None, None)
            d_values = grid.dot(d_i, grid.key_slice(v, j).T)
            weights, d_dot, of_q, of_k, of_score = block.cotangents(one, of.block(i, j, test), d_values, saved, delta)
            if d_q_norm is not None:
                d_q_norm += of_q.sum(1, keepdims=True)
                d_k_norm = grid.add_keys(d_k_norm, j, of_k.sum(0, keepdims=True))
            return (
                d_q + grid.dot(d_dot, grid.key_slice(k, j)),
                d_q_norm,
                grid.add_keys(d_k, j, grid.dot(q_t, d_dot)),
                d_k_norm,
                grid.add_keys(d_v, j, grid.dot(d_t, weights)),
                jax.tree.map(lambda x, y: x + (y if x.shape == y.shape else y.sum()), d_score, of_score),
            )

        def block_of_queries(carry, i):
            d_q = jnp.zeros((sizes.query_block, q.shape[1]), dtype)
            d_q_norm = d_q[:, :1] if score.needs_norms else None
            d_q, d_q_norm, *carry = of.for_keys(i, step, (d_q, d_q_norm, *carry))
            d_q = d_q if d_q_norm is None else d_q + grid.query_slice(q, i) * d_q_norm
            return tuple(carry), (options.scale * d_q).astype(dtypes[0])

        d_k_norm = jnp.zeros((1, len(k)), dtype) if score.needs_norms else None
        d_score = block.with_parameters(one, [jnp.zeros_like(x) for x in block.parameters(one)])
        carry = (jnp.zeros_like(k.T, dtype), d_k_norm, jnp.zeros_like(v.T, dtype), d_score)
        carry, d_q = jax.lax.scan(block_of_queries, carry, jnp.arange(grid.query_blocks))
        # The barrier keeps XLA from folding the transposition into the slow product.
        d_k, d_k_norm, d_v, d_score = jax.lax.optimization_barrier(carry)
        d_k = d_k.T if d_k_norm is None else d_k.T + k * d_k_norm.T
        d_leaves = (x.reshape(1, -1) for x in jax.tree.leaves(d_score))
        d_k, d_v = options.scale * d_k, d_v.T
        if not shared:  # else after the sum
            d_k, d_v = d_k.astype(dtypes[1]), d_v.astype(dtypes[2])
        return d_q.reshape(q.shape), d_k, d_v, *d_leaves

    d_q, d_k, d_v, *d_leaves = each_head(head, q, k, v, d_out, *rows)
    d_k, d_v = (x[:, : sizes.keys] for x in (d_k, d_v))
    if shared:
        d_k, d_v = (x.reshape(*x.shape[:2], groups, -1, x.shape[3]).sum(3) for x in (d_k, d_v))
    d_leaves = [y.sum((0, 1)).reshape(x.shape) for x, y in zip(block.parameters(score), d_leaves)]
    found = (x.astype(dtype) for x, dtype in zip((d_q[:, : sizes.queries], d_k, d_v), dtypes))
    return *found, block.with_parameters(score, d_leaves), None, None


class Grid(NamedTuple):
    """Queries and keys split into equal blocks, padded with zeros."""

    options: Options
    sizes: Sizes
    visits: Visits

    @property
    def query_blocks(self) -> int:
        return -(-self.sizes.queries // self.sizes.query_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.sizes.keys // self.sizes.key_block)

    def segments(self, mask: Mask | None) -> tuple:
        """The mask's segments, padded, as columns `[batch or 1, queries, 1]` and rows `[batch or 1, 1, keys]`."""
        q_segments, k_segments = (None, None) if mask is None else mask.segments
        q_segments = jax.tree.map(lambda x: self.pad_queries(x)[:, :, None], q_segments)
        return q_segments, jax.tree.map(lambda x: self.pad_keys(x)[:, None], k_segments)

    def pad_queries(self, x: jax.Array) -> jax.Array:
        return pad(x, self.sizes.query_block)

    def pad_keys(self, x: jax.Array) -> jax.Array:
        return pad(x, self.sizes.key_block)

    def query_slice(self, x: jax.Array, i: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.sizes.query_block, self.sizes.query_block, axis)

    def key_slice(self, x: jax.Array, j: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.sizes.key_block, self.sizes.key_block, axis)

    def add_keys(self, x: jax.Array, j: jax.Array, update: jax.Array) -> jax.Array:
        """`x` `[dim, padded keys]` with `update` added to its block `j`."""
        return jax.lax.dynamic_update_slice_in_dim(x, self.key_slice(x, j, 1) + update, j * self.sizes.key_block, 1)

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x.astype(wide(x)), y.astype(wide(y)), precision=self.options.precision)


class Head(NamedTuple):
    """What the blocks of one head are made of; its arrays are padded `[length, dim]`."""

    grid: Grid
    score: Score
    mask: Mask | None
    head: jax.Array
    example: jax.Array
    q: jax.Array
    k: jax.Array
    q_segments: tuple
    k_segments: tuple

    def block(self, i: jax.Array, j: jax.Array, test: bool) -> Block:
        """Query block `i` with key block `j`."""
        grid, (queries, keys, query_block, key_block) = self.grid, self.grid.sizes
        q, k = (x.astype(wide(x)) for x in (grid.query_slice(self.q, i), grid.key_slice(self.k, j)))
        dot = grid.dot(grid.options.scale * q, k.T)
        if grid.options.bias:
            dot += grid.options.bias
        q_norm, k_norm = None, None
        if self.score.needs_norms:
            q_norm, k_norm = (grid.options.scale / 2 * jnp.square(x).sum(-1, keepdims=True) for x in (q, k))
            k_norm = k_norm.T
        row = i * query_block + jnp.arange(query_block, dtype=jnp.int32)[:, None]
        column = j * key_block + jnp.arange(key_block, dtype=jnp.int32)[None]
        position, allowed = row + (keys - queries), None
        if test:
            allowed = (row < queries) & (column < keys)
            if self.mask is not None:
                q_segment, k_segment = (
                    jax.tree.map(lambda x, take=take, n=n: take(self.of_example(x), n), segments)
                    for segments, take, n in (
                        (self.q_segments, grid.query_slice, i),
                        (self.k_segments, lambda x, n: grid.key_slice(x, n, 1), j),
                    )
                )
                allowed &= self.mask.allowed(position, column, q_segment, k_segment)
        return Block(dot, q_norm, k_norm, position, column, self.head, allowed)

    def of_example(self, x: jax.Array) -> jax.Array:
        return x[self.example if len(x) > 1 else 0]

    def for_keys(self, i: jax.Array, body, carry):
        """Runs `body(i, j, test, carry)` over the key blocks of query block `i`; `test`: whether the mask matters."""
        seen = self.grid.visits
        if self.grid.key_blocks == 1:
            return body(i, 0, seen.tests or not seen.full.all(), carry)
        order, full, some = (self.of_example(jnp.asarray(x))[i] for x in seen)
        if seen.fills:
            carry = jax.lax.fori_loop(0, full, lambda n, carry: body(i, order[n], False, carry), carry)
        if seen.tests:
            carry = jax.lax.fori_loop(full, some, lambda n, carry: body(i, order[n], True, carry), carry)
        return carry


def wide(x: jax.Array) -> jnp.dtype:
    """The dtype of the arithmetic. Blocks are converted when they are used: a copy of an array would stay in memory."""
    return jnp.promote_types(x.dtype, jnp.float32)


def pad(x: jax.Array, size: int) -> jax.Array:
    """`x` `[batch, length, ...]` padded with zeros to a multiple of `size`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))
