"""Block attention on GPUs, in Triton: one program for each tile of queries, or of keys in their pass.

Absent blocks are moved to the end of each list, beyond the loop. The pass for keys and values reads the lists sorted by
key block, so no two programs add to one place. Formulas are in xla.py.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.block_attention.lists import added, by_key_block
from efficient_tx.kernels.block_attention.options import Options, alike
from efficient_tx.kernels.precision import missing
from efficient_tx.kernels.shapes import result


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens of a tile at most: a tile is a part of a block, whose number of tokens is a power of two.

    Attributes:
      queries, keys: of the passes by queries.
      outer, inner: keys and queries of the pass by keys.
      warps, stages: of a program, and of its pipeline.
    """

    queries: int = 64
    keys: int = 64
    outer: int = 64
    inner: int = 32
    warps: int = 4
    stages: int = 2


def unsupported(options: Options, q, k, v, mask, blocks, bias) -> str | None:
    dtypes = {x.dtype for x in (q, k, v)}
    if not dtypes <= {jnp.dtype(x) for x in (jnp.float32, jnp.bfloat16, jnp.float16)}:
        return f"it takes float32, bfloat16 and float16, not {', '.join(sorted(map(str, dtypes)))}"
    if options.block_size % 16:
        return f"block_size is {options.block_size}: pass a multiple of 16"
    for name, dim in (("head_dim", q.shape[3]), ("v_dim", v.shape[3])):
        if dim < 16 or dim > 256 or dim & (dim - 1):
            return f"{name} is {dim}: pass a power of two from 16 to 256"
    if not (q.size and k.size and v.size):
        return "there is nothing to attend to"
    if reason := missing(options.precision, "GPU"):
        return reason
    return options.foreign_to_kernels()


def sizes(options: Options, q, k, v, *others: Any) -> BlockSizes:
    if q.dtype == jnp.float32:
        return BlockSizes(64, 32, 32, 32, warps=8)
    return BlockSizes() if max(q.shape[3], v.shape[3]) <= 128 else BlockSizes(32, 32, 32, 32, warps=8)


def forward(
    options: Options, sizes: BlockSizes, q, k, v, mask, blocks, bias, *, interpret: Any = False
) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Output and log-sum-exp; operands as in `Options`."""
    rows = added(options, mask, blocks, bias)
    call = Call(options, sizes, q.shape, k.shape, blocks.shape[3], interpret)
    dtype, (q, k, v) = q.dtype, alike(q, k, v)
    (batch, length, heads, dim), v_dim = q.shape, v.shape[3]
    out, lse = call.by_query(
        partial(attend, call),
        [(q, call.of_queries(dim)), (k, call.of_keys(dim)), (v, call.of_keys(v_dim)), *call.lists(blocks, rows)[0]],
        [
            ((batch, length, heads, v_dim), dtype, call.of_queries(v_dim)),
            ((batch, heads, length), jnp.float32, call.of_query_numbers()),
        ],
        4 * (dim + v_dim),
    )
    return (out, lse.swapaxes(1, 2)), None


def backward(
    options: Options, sizes: BlockSizes, operands: tuple, outputs: tuple, saved: None, cotangents: tuple,
    *, interpret: Any = False,
) -> tuple:  # fmt: skip
    """Cotangents of q, k, v and the bias, and None for the mask and the blocks."""
    q, k, v, mask, blocks, bias = operands
    (out, lse), (d_out, d_lse) = outputs, cotangents
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1) - d_lse
    lse = jnp.where(jnp.isfinite(lse), lse, 0)  # a query without keys has logits −inf
    lse, delta = lse.swapaxes(1, 2), delta.swapaxes(1, 2)
    rows = added(options, mask, blocks, bias)
    call = Call(options, sizes, q.shape, k.shape, blocks.shape[3], interpret)
    dtypes, (q, k, v, d_out) = (q.dtype, k.dtype, v.dtype), alike(q, k, v, d_out)
    dim, v_dim = q.shape[3], v.shape[3]
    with_bias = bias is not None and options.trained_bias

    lists, order = call.lists(blocks, rows)
    d_q, *d_rows = call.by_query(
        partial(pull_back_to_queries, call, rows is not None),
        [(q, call.of_queries(dim)), (d_out, call.of_queries(v_dim))]
        + [(x, call.of_query_numbers()) for x in (lse, delta)]
        + [(k, call.of_keys(dim)), (v, call.of_keys(v_dim)), *lists],
        [(q.shape, q.dtype, call.of_queries(dim)), *call.d_rows(with_bias)],
        6 * dim + 4 * v_dim,
    )
    d_k, d_v = call.by_key(partial(pull_back_to_keys, call), q, k, v, d_out, lse, delta, rows, blocks)
    d_bias = None
    if with_bias:
        batch, heads, n, size = len(q), q.shape[2], blocks.shape[3], options.block_size
        d_rows = d_rows[0].reshape(batch, heads, -1, size // call.query_tile, n, size)
        # The program wrote the blocks that are there, in the order of its loop.
        back = jnp.broadcast_to(jnp.argsort(order, axis=-1), (batch, heads, d_rows.shape[2], n))[..., None]
        d_rows = jnp.take_along_axis(d_rows.sum(3), back, axis=3)
        d_rows = jnp.where((blocks >= 0)[..., None], d_rows, 0)
        d_bias = d_rows.sum(1, keepdims=True) if bias.shape[1] == 1 else d_rows
        d_bias = d_bias if bias.shape[-1] > 1 else d_bias.sum(-1, keepdims=True)
    d_q, d_k, d_v = (x.astype(dtype) for x, dtype in zip((d_q, d_k, d_v), dtypes))
    return d_q, d_k, d_v, None, None, d_bias


@dataclasses.dataclass(frozen=True)
class Call:
    """The shapes of a call and the blocks of its operands, `[batch, length, heads, dim]`."""

    options: Options
    sizes: BlockSizes
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    n: int
    interpret: Any

    @property
    def repeats(self) -> int:
        """Query heads of a head of keys."""
        return self.queries[2] // self.keys[2]

    @property
    def query_tile(self) -> int:
        return tile(self.options.block_size, self.sizes.queries)

    def of_queries(self, dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.query_tile, None, dim), lambda i, h, b: (b, i, h, 0))

    def of_query_numbers(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, self.query_tile), lambda i, h, b: (b, h, i))

    def of_keys(self, dim: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.keys[1], None, dim), lambda i, h, b: (b, 0, h // self.repeats, 0))

    def of_list(self, x: jax.Array) -> pl.BlockSpec:
        """The list of a tile of queries: of `[batch or 1, heads or 1, query blocks, ...]`."""
        tiles, (batch, heads) = self.options.block_size // self.query_tile, x.shape[:2]
        rest = (0,) * (x.ndim - 3)
        return pl.BlockSpec(
            (None, None, None, *x.shape[3:]),
            lambda i, h, b: (b if batch > 1 else 0, h if heads > 1 else 0, i // tiles, *rest),
        )

    def lists(self, blocks: jax.Array, rows: jax.Array | None) -> tuple[list, jax.Array]:
        """The listed blocks, how many, and what is added to their logits; their order: absent ones last."""
        order = jnp.argsort(blocks < 0, axis=-1, stable=True)
        operands = [jnp.take_along_axis(blocks, order, axis=-1), (blocks >= 0).sum(-1, keepdims=True, dtype=jnp.int32)]
        if rows is not None:
            operands.append(jnp.take_along_axis(rows, order[..., None], axis=3))
        return [(x, self.of_list(x)) for x in operands], order

    def d_rows(self, wanted: bool) -> list:
        (batch, length, heads, _), size = self.queries, self.options.block_size
        spec = pl.BlockSpec((None, None, None, self.n, size), lambda i, h, b: (b, h, i, 0, 0))
        return [((batch, heads, length // self.query_tile, self.n, size), jnp.float32, spec)] if wanted else []

    def by_query(self, kernel, operands, results, flops: int) -> list[jax.Array]:
        batch, length, heads, _ = self.queries
        return self.call(kernel, (length // self.query_tile, heads, batch), operands, results, flops)

    def by_key(self, kernel, q, k, v, d_out, lse, delta, rows, blocks) -> list[jax.Array]:
        """The pass over tiles of keys and, in a loop, the blocks of queries that list them: d_k and d_v."""
        size, (batch, length, groups, _) = self.options.block_size, self.keys
        width = tile(size, self.sizes.outer)
        entries, starts = by_key_block(blocks, length // size)

        def of_keys(x):
            return pl.BlockSpec((None, width, None, x.shape[3]), lambda c, g, b: (b, c, g, 0))

        def of_queries(x):
            """All queries of the query heads that share these keys."""
            return pl.BlockSpec((None, x.shape[1], self.repeats, x.shape[3]), lambda c, g, b: (b, 0, g, 0))

        def of_heads(x):
            """The same of `[batch or 1, heads or 1, ...]`."""
            heads, rest = min(self.repeats, x.shape[1]), (0,) * (x.ndim - 2)
            each, many = x.shape[0] > 1, x.shape[1] > 1
            return pl.BlockSpec(
                (None, heads, *x.shape[2:]), lambda c, g, b: (b if each else 0, g if many else 0, *rest)
            )

        others = (lse, delta, entries, starts, *(() if rows is None else (rows,)))
        return self.call(
            kernel,
            (length // width, groups, batch),
            [(x, of_queries(x)) for x in (q, d_out)] + [(x, of_keys(x)) for x in (k, v)]
            + [(x, of_heads(x)) for x in others],
            [(x.shape, x.dtype, of_keys(x)) for x in (k, v)],
            6 * q.shape[3] + 4 * v.shape[3],
        )  # fmt: skip

    def call(self, kernel, grid, operands, results, flops: int) -> list[jax.Array]:
        arrays, in_specs = zip(*operands)
        shapes = [result(shape, dtype, arrays) for shape, dtype, _ in results]
        batch, length, heads, _ = self.queries
        weights = batch * length * heads * self.n * self.options.block_size
        return pl.pallas_call(
            kernel,
            shapes,
            grid=grid,
            in_specs=in_specs,
            out_specs=[spec for _, _, spec in results],
            compiler_params=plgpu.CompilerParams(num_warps=self.sizes.warps, num_stages=self.sizes.stages),
            cost_estimate=pl.CostEstimate(
                flops=weights * flops // 2,
                transcendentals=weights,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
            ),
            interpret=self.interpret,
            name=f"block_attention_{kernel.func.__name__}",
        )(*arrays)


def attend(call: Call, q, k, v, listed, count, *refs) -> None:
    *rows, out, lse = refs
    size, width = call.options.block_size, tile(call.options.block_size, call.sizes.keys)
    one_q, first = q[...], pl.program_id(0) * call.query_tile

    def see(step, carry):
        sums, total, peak = carry
        slot, inside = jax.lax.div(step, size // width), jax.lax.rem(step, size // width) * width
        start = listed[slot] * size + inside
        logits = dot(call, one_q, k[pl.ds(start, width), :], (1, 1)) * call.options.scale
        if rows:
            logits += rows[0][slot, pl.ds(inside, width)][None]
        logits = masked(call, logits, first, start, query_axis=0)
        new_peak = jnp.maximum(peak, logits.max(1))
        weights, fade = jnp.exp(logits - new_peak[:, None]), jnp.exp(peak - new_peak)
        values = v[pl.ds(start, width), :]
        sums = sums * fade[:, None] + dot(call, weights.astype(values.dtype), values, (1, 0))
        return sums, total * fade + weights.sum(1), new_peak

    nothing = jnp.zeros((call.query_tile, v.shape[1]), jnp.float32), jnp.zeros(call.query_tile, jnp.float32)
    # Finite, so that a query without keys so far adds exp(−inf − peak) = 0, not exp(−inf + inf).
    peak = jnp.full(call.query_tile, jnp.finfo(jnp.float32).min / 2, jnp.float32)
    sums, total, peak = jax.lax.fori_loop(0, count[0] * (size // width), see, (*nothing, peak))
    found = total > 0
    total = jnp.where(found, total, 1)
    out[...] = (sums / total[:, None]).astype(out.dtype)
    lse[...] = jnp.where(found, jnp.log(total) + peak, -jnp.inf)


def pull_back_to_queries(call: Call, with_rows: bool, q, d_out, lse, delta, k, v, listed, count, *refs) -> None:
    rows, (d_q, *d_rows) = (refs[0], refs[1:]) if with_rows else (None, refs)
    size, width = call.options.block_size, tile(call.options.block_size, call.sizes.keys)
    first = pl.program_id(0) * call.query_tile
    one_q, one_d, one_lse, one_delta = q[...], d_out[...], lse[...][:, None], delta[...][:, None]

    def see(step, sums):
        slot, inside = jax.lax.div(step, size // width), jax.lax.rem(step, size // width) * width
        start = listed[slot] * size + inside
        keys = k[pl.ds(start, width), :]
        logits = dot(call, one_q, keys, (1, 1)) * call.options.scale
        if with_rows:
            logits += rows[slot, pl.ds(inside, width)][None]
        weights = jnp.exp(masked(call, logits, first, start, query_axis=0) - one_lse)
        d_logits = weights * (dot(call, one_d, v[pl.ds(start, width), :], (1, 1)) - one_delta)
        if d_rows:
            d_rows[0][slot, pl.ds(inside, width)] = d_logits.sum(0)
        return sums + dot(call, d_logits.astype(keys.dtype), keys, (1, 0))

    sums = jnp.zeros((call.query_tile, q.shape[1]), jnp.float32)
    sums = jax.lax.fori_loop(0, count[0] * (size // width), see, sums)
    d_q[...] = (sums * call.options.scale).astype(d_q.dtype)


def pull_back_to_keys(call: Call, q, d_out, k, v, lse, delta, entries, starts, *refs) -> None:
    """Blocks of weights are `[keys, queries]`, so that no product is of a transpose."""
    *rows, d_k, d_v = refs
    size, width, height = call.options.block_size, k.shape[0], tile(call.options.block_size, call.sizes.inner)
    one_k, one_v, first = k[...], v[...], pl.program_id(0) * width
    block, within = jax.lax.div(first, size), jax.lax.rem(first, size)

    def of_head(head, sums):
        def own(x):
            return head if x.shape[0] > 1 else 0

        def see(step, sums):
            k_sums, v_sums = sums
            entry = entries[own(entries), jax.lax.div(step, size // height)]
            query, slot = jax.lax.div(entry, call.n), jax.lax.rem(entry, call.n)
            start = query * size + jax.lax.rem(step, size // height) * height
            some = pl.ds(start, height)
            one_q, one_d = q[some, head, :], d_out[some, head, :]
            logits = dot(call, one_k, one_q, (1, 1)) * call.options.scale
            if rows:
                logits += rows[0][own(rows[0]), query, slot, pl.ds(within, width)][:, None]
            weights = jnp.exp(masked(call, logits, start, first, query_axis=1) - lse[head, some][None])
            d_logits = weights * (dot(call, one_v, one_d, (1, 1)) - delta[head, some][None])
            k_sums += dot(call, d_logits.astype(one_q.dtype), one_q, (1, 0))
            return k_sums, v_sums + dot(call, weights.astype(one_d.dtype), one_d, (1, 0))

        begin, end = (starts[own(starts), block + i] * (size // height) for i in (0, 1))
        return jax.lax.fori_loop(begin, end, see, sums)

    sums = tuple(jnp.zeros(x.shape, jnp.float32) for x in (one_k, one_v))
    k_sums, v_sums = jax.lax.fori_loop(0, call.repeats, of_head, sums) if call.repeats > 1 else of_head(0, sums)
    d_k[...] = (k_sums * call.options.scale).astype(d_k.dtype)
    d_v[...] = v_sums.astype(d_v.dtype)


def masked(call: Call, logits: jax.Array, first_query, first_key, *, query_axis: int) -> jax.Array:
    """The logits of a tile, −inf where a query does not see a key."""
    query = first_query + jax.lax.broadcasted_iota(jnp.int32, logits.shape, query_axis)
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1 - query_axis)
    seen = call.options.seen(query, key)
    if call.options.keys % call.options.block_size:
        seen = (key < call.options.keys) if seen is None else seen & (key < call.options.keys)
    return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def tile(block: int, most: int) -> int:
    """The largest power of two that divides both."""
    return math.gcd(block, most)


def dot(call: Call, x: jax.Array, y: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """The product that contracts an axis of each, in float32; 16-bit factors have no other precision."""
    precision = call.options.precision if x.dtype == y.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((axes[0],), (axes[1],)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
