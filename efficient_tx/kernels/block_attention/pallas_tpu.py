"""Block attention on TPUs: the index lists are prefetched scalars, and steer which blocks are loaded.

A program sees one block of queries of all heads that share a list (as many as fit), and the listed key blocks in steps
of several ("slots") where blocks are small. A block that is not there is one that is loaded already: it costs no memory
access, and a step without any block no arithmetic. The pass for keys and values goes by key blocks: the lists are
sorted by them, so each is loaded once, and sums stay in VMEM. Formulas are in xla.py.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from efficient_tx.kernels.block_attention.lists import added
from efficient_tx.kernels.block_attention.options import Options, alike
from efficient_tx.kernels.block_attention.tpu_grid import BlockSizes, Grid
from efficient_tx.kernels.precision import missing
from efficient_tx.kernels.shapes import MOST_SCALARS


def unsupported(options: Options, q, k, v, mask, blocks, bias) -> str | None:
    size, dtypes = options.block_size, {x.dtype for x in (q, k, v)}
    if not dtypes <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)}:
        return f"it takes float32 and bfloat16, not {', '.join(sorted(map(str, dtypes)))}"
    rows = 8 if jnp.dtype(jnp.bfloat16) not in dtypes else 16
    if size % rows or size > 512:
        return f"block_size is {size}: pass a multiple of {rows} up to 512"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"head_dim is {q.shape[3]} and v_dim {v.shape[3]}: at most 256 fit in VMEM"
    if not (q.size and k.size and v.size):
        return "there is nothing to attend to"
    if reason := missing(options.precision, "TPU"):
        return reason
    queries, n = blocks.shape[2:]
    keys, slots = k.shape[1] // size, max(1, BlockSizes().tokens // size)
    scalars = blocks.shape[0] * blocks.shape[1] * (queries * n + keys * slots) * (slots + 1) // slots
    if scalars > MOST_SCALARS:
        return f"its lists are {scalars} numbers: scalar memory holds {MOST_SCALARS}"
    return options.foreign_to_kernels()


def sizes(options: Options, *operands: Any) -> BlockSizes:
    return BlockSizes()


def forward(
    options: Options, sizes: BlockSizes, q, k, v, mask, blocks, bias, *, interpret: Any = False
) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Output and log-sum-exp; operands as in `Options`."""
    rows = added(options, mask, blocks, bias)
    grid = Grid.of(options, sizes, q, k, v, blocks, rows)
    dim, v_dim = grid.dim, grid.v_dim
    dtype, (q, k, v) = q.dtype, map(grid.laid, alike(q, k, v))
    shape = grid.batch, grid.heads, grid.query_blocks
    out, lse = grid.by_query(
        partial(attend, grid),
        [(q, grid.of_queries(dim)), *grid.listed(k, dim), *grid.listed(v, v_dim), *grid.rows(rows)],
        [
            ((*shape[:2], *grid.shape(grid.query_blocks, v_dim)), dtype, grid.of_queries(v_dim)),
            ((*shape, 1, options.block_size), jnp.float32, grid.of_query_rows()),
        ],
        [(grid.together, options.block_size, x) for x in (v_dim, 1, 1)],
        blocks,
        (4 * (dim + v_dim), grid.slots * options.block_size),
        interpret,
    )
    return (grid.unlaid(out, grid.query_blocks, v_dim), lse.reshape(*shape[:2], -1).swapaxes(1, 2)), None


def backward(
    options: Options, sizes: BlockSizes, operands: tuple, outputs: tuple, saved: None, cotangents: tuple,
    *, interpret: Any = False,
) -> tuple:  # fmt: skip
    """Cotangents of q, k, v and the bias, and None for the mask and the blocks."""
    q, k, v, mask, blocks, bias = operands
    (out, lse), (d_out, d_lse) = outputs, cotangents
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    lse = jnp.where(jnp.isfinite(lse), lse, 0)  # a query without keys has logits −inf
    rows = added(options, mask, blocks, bias)
    grid = Grid.of(options, sizes, q, k, v, blocks, rows)
    dim, v_dim = grid.dim, grid.v_dim
    dtypes, (q, k, v, d_out) = (q.dtype, k.dtype, v.dtype), map(grid.laid, alike(q, k, v, d_out))
    lse, delta = (
        x.swapaxes(1, 2).reshape(grid.batch, grid.heads, grid.query_blocks, 1, -1) for x in (lse, delta)
    )  # fmt: skip
    with_bias = bias is not None and options.trained_bias

    by_query = [(q, grid.of_queries(dim)), (d_out, grid.of_queries(v_dim))]
    by_query += [(x, grid.of_query_rows()) for x in (lse, delta)]
    d_q, *d_rows = grid.by_query(
        partial(pull_back_to_queries, grid, with_bias),
        [*by_query, *grid.listed(k, dim), *grid.listed(v, v_dim), *grid.rows(rows)],
        [(q.shape, q.dtype, grid.of_queries(dim)), *grid.d_rows(with_bias)],
        [(grid.together, options.block_size, x) for x in (dim, 1, 1)],
        blocks,
        (6 * dim + 4 * v_dim, grid.slots * options.block_size),
        interpret,
    )
    d_k, d_v = grid.by_key(partial(pull_back_to_keys, grid), q, k, v, d_out, lse, delta, rows, blocks, interpret)
    d_bias = None
    if with_bias:
        d_rows = d_rows[0].reshape(*d_rows[0].shape[:3], -1, options.block_size)[:, :, :, : blocks.shape[3]]
        d_bias = d_rows.sum(1, keepdims=True) if bias.shape[1] == 1 else d_rows
        d_bias = d_bias if bias.shape[-1] > 1 else d_bias.sum(-1, keepdims=True)
    d_q = grid.unlaid(d_q, grid.query_blocks, dim).astype(dtypes[0])
    d_k = grid.unlaid(d_k, grid.key_blocks, dim).astype(dtypes[1])
    d_v = grid.unlaid(d_v, grid.key_blocks, v_dim).astype(dtypes[2])
    return d_q, d_k, d_v, None, None, d_bias


def attend(grid: Grid, lists, q, *refs) -> None:
    refs = iter(refs)
    k, v = take(refs, grid.slots), take(refs, grid.slots)
    rows = next(refs) if grid.added else None
    out, lse, sums, peaks, totals = refs
    place = [pl.program_id(axis) for axis in range(4)]
    first, step = place[2] * grid.options.block_size, place[3]

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        totals[...] = jnp.zeros_like(totals)
        # Finite, so that a query without keys so far adds exp(−inf − peak) = 0, not exp(−inf + inf).
        peaks[...] = jnp.full_like(peaks, jnp.finfo(jnp.float32).min / 2)

    listed = [lists[grid.at(*place) + slot] for slot in range(grid.slots)]

    @pl.when(some(listed))
    def _():
        size = grid.options.block_size
        shape = size, grid.slots * size
        query = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        logits_of = masked(grid, query, positions(listed, shape, 1, size), None if rows is None else rows[...])

        for h in range(grid.together):
            g = h // grid.repeats
            keys, values = grid.stacked(k, g, listed, grid.dim), grid.stacked(v, g, listed, grid.v_dim)
            logits = logits_of(products(grid, grid.tokens(q, h, place[2], grid.dim), keys, grid.dim))
            peak = jnp.maximum(peaks[h], logits.max(-1, keepdims=True))
            weights, fade = jnp.exp(logits - peak), jnp.exp(peaks[h] - peak)
            sums[h] = sums[h] * fade + weighted(grid, weights, values, grid.v_dim)
            totals[h] = totals[h] * fade + weights.sum(-1, keepdims=True)
            peaks[h] = peak

    @pl.when(step == grid.steps - 1)
    def _():
        for h in range(grid.together):
            found = totals[h] > 0
            total = jnp.where(found, totals[h], 1)
            grid.put(out, h, place[2], sums[h] / total)
            lse[h] = turned(jnp.where(found, jnp.log(total) + peaks[h], -jnp.inf))


def pull_back_to_queries(grid: Grid, with_bias: bool, lists, q, d_out, lse, delta, *refs) -> None:
    refs = iter(refs)
    k, v = take(refs, grid.slots), take(refs, grid.slots)
    rows = next(refs) if grid.added else None
    d_q = next(refs)
    d_rows = next(refs) if with_bias else None
    sums, lses, deltas = refs
    place = [pl.program_id(axis) for axis in range(4)]
    first, step = place[2] * grid.options.block_size, place[3]

    @pl.when(step == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)
        for h in range(grid.together):
            lses[h], deltas[h] = turned(lse[h]), turned(delta[h])

    listed = [lists[grid.at(*place) + slot] for slot in range(grid.slots)]
    if with_bias:
        d_rows[...] = jnp.zeros_like(d_rows)

    @pl.when(some(listed))
    def _():
        size = grid.options.block_size
        shape = size, grid.slots * size
        query = first + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        logits_of = masked(grid, query, positions(listed, shape, 1, size), None if rows is None else rows[...])

        for h in range(grid.together):
            g = h // grid.repeats
            keys, values = grid.stacked(k, g, listed, grid.dim), grid.stacked(v, g, listed, grid.v_dim)
            one_q, one_d = grid.tokens(q, h, place[2], grid.dim), grid.tokens(d_out, h, place[2], grid.v_dim)
            weights = jnp.exp(logits_of(products(grid, one_q, keys, grid.dim)) - lses[h])
            d_logits = weights * (products(grid, one_d, values, grid.v_dim) - deltas[h])
            sums[h] += weighted(grid, d_logits, keys, grid.dim)
            if with_bias:
                d_rows[...] += d_logits.sum(0, keepdims=True)

    @pl.when(step == grid.steps - 1)
    def _():
        for h in range(grid.together):
            grid.put(d_q, h, place[2], grid.options.scale * sums[h])


def pull_back_to_keys(grid: Grid, slots: int, steps: int, key, entries, *refs) -> None:
    """Blocks of weights are `[keys, queries]`: numbers of the queries are rows, and no product is of a transpose."""
    refs = iter(refs)
    q, d_out = take(refs, slots), take(refs, slots)
    lse, delta, k, v = take(refs, 4)
    rows = take(refs, slots) if grid.added else None
    d_k, d_v, k_sums, v_sums = refs
    step = pl.program_id(2)
    at = grid.place(pl.program_id(0), pl.program_id(1), grid.lists) * steps
    block = key[at + step]

    @pl.when((step == 0) | (key[at + jnp.maximum(step - 1, 0)] != block))
    def _():
        k_sums[...] = jnp.zeros_like(k_sums)
        v_sums[...] = jnp.zeros_like(v_sums)

    listed = [entries[(at + step) * slots + slot] for slot in range(slots)]

    @pl.when(some(listed))
    def _():
        size = grid.options.block_size
        shape = size, slots * size
        queries = [jnp.where(entry < 0, -1, jax.lax.div(entry, grid.n)) for entry in listed]
        query = positions(queries, shape, 1, size)
        keys = block * size + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        added = None
        if rows is not None:
            added = turned(rows[0][...])
            for slot in range(1, slots):
                lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
                added = jnp.where(lane < slot * size, added, turned(rows[slot][...]))
        logits_of = masked(grid, query, keys, added)

        for h in range(grid.together):
            g = h // grid.repeats
            some_q, some_d = grid.stacked(q, h, queries, grid.dim), grid.stacked(d_out, h, queries, grid.v_dim)
            one_k, one_v = grid.tokens(k, g, block, grid.dim), grid.tokens(v, g, block, grid.v_dim)
            weights = jnp.exp(logits_of(products(grid, one_k, some_q, grid.dim)) - lse[h])
            d_logits = weights * (products(grid, one_v, some_d, grid.v_dim) - delta[h])
            k_sums[g] += weighted(grid, d_logits, some_q, grid.dim)
            v_sums[g] += weighted(grid, weights, some_d, grid.v_dim)

    @pl.when((step == steps - 1) | (key[at + jnp.minimum(step + 1, steps - 1)] != block))
    def _():
        for g in range(grid.groups):
            grid.put(d_k, g, block, grid.options.scale * k_sums[g])
            grid.put(d_v, g, block, v_sums[g])


# A position that no list has: a block that is not there begins here.
NOWHERE = 1 << 29


def positions(listed: list, shape: tuple[int, int], axis: int, size: int) -> jax.Array:
    """The positions of the tokens of the listed blocks, int32 `shape`, one after the other along an axis."""
    offset = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    found = offset
    for slot, block in enumerate(listed):
        start = jnp.where(block < 0, NOWHERE, block * size) - slot * size
        found = start + offset if slot == 0 else jnp.where(offset < slot * size, found, start + offset)
    return found


def masked(grid: Grid, query: jax.Array, key: jax.Array, added: jax.Array | None):
    """The function that makes logits of products of queries and keys at these positions."""
    seen = (query < NOWHERE) & (key < grid.options.keys)
    visible = grid.options.seen(query, key)
    seen = seen if visible is None else seen & visible

    def logits(product):
        product *= grid.options.scale
        return jnp.where(seen, product if added is None else product + added, -jnp.inf)

    return logits


def some(listed: list) -> jax.Array:
    """Whether a block is there."""
    found = listed[0] >= 0
    for block in listed[1:]:
        found |= block >= 0
    return found


def turned(x: jax.Array) -> jax.Array:
    """A column `[n, 1]` as a row `[1, n]`, or the other way round."""
    n, axis = max(x.shape), 0 if x.shape[1] == 1 else 1
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (n, n), a) for a in (0, 1))
    return jnp.where(row == column, x, 0).sum(axis, keepdims=True)


def dot(grid: Grid, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product that contracts an axis of each, in float32; bfloat16 factors have no other precision."""
    precision = grid.options.precision if x.dtype == y.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def products(grid: Grid, x: jax.Array, stack: jax.Array, dim: int) -> jax.Array:
    """Inner products of tokens `[n, dim]` and those of `Grid.stacked`."""
    return dot(grid, x, stack, (1, 0 if grid.last(dim) else 1))


def weighted(grid: Grid, weights: jax.Array, stack: jax.Array, dim: int) -> jax.Array:
    """Sums of the tokens of `Grid.stacked`, by weights `[n, tokens]`."""
    return dot(grid, weights.astype(stack.dtype), stack, (1, 1 if grid.last(dim) else 0))


def take(refs: Iterator, count: int) -> list:
    return [next(refs) for _ in range(count)]
