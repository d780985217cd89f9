"""Attention on TPUs: a Pallas kernel forward, one for the cotangents of queries and scores, one for those of keys.

Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) in on-chip memory, as in FlashAttention-2 (Dao 2023,
arXiv 2307.08691). The last axis of the grid visits the blocks that the mask does not empty: their numbers are
prefetched, so that absent blocks are never copied.

All arrays are `[batch, heads, dim, length]`, dim 1 for what is one number a query or key: with the length last none is
padded in memory, where 64 dims would take the room of 128 and one number that of 128. The side that stays in a kernel
(queries, or in the last kernel keys) is transposed once, the side that is visited is used as it is: products have the
forms x y and x yᵀ, which need no transposition. So the kernel for keys has blocks keys × queries.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.flash_attention import block
from efficient_tx.kernels.flash_attention.block import Block
from efficient_tx.kernels.flash_attention.blocks import Sizes, Visits, most_listed, same, visits
from efficient_tx.kernels.flash_attention.call import LEAST, MATRICES, Call
from efficient_tx.kernels.flash_attention.call import unsupported as reason_against
from efficient_tx.kernels.flash_attention.mask import Mask
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.flash_attention.score import Score
from efficient_tx.kernels.flash_attention.tpu_layout import LANES, across, as_row, by_head, by_token
from efficient_tx.kernels.op import vary_alike
from efficient_tx.kernels.shapes import MOST_SCALARS, result


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Rows of queries and of keys in a block, multiples of 128."""

    queries: int = 512
    keys: int = 512
    backward_queries: int = 512
    backward_keys: int = 512


def unsupported(options: Options, *arrays: Any) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    if reason := reason_against("tpu", options, *arrays):
        return reason
    q, k, _, _, mask, _ = arrays
    size = sizes(options, q, k)
    for blocks in ((size.queries, size.keys), (size.backward_queries, size.backward_keys)):
        numbers = most_listed(mask, Sizes(q.shape[1], k.shape[1], *blocks), enough=MOST_SCALARS)
        if numbers > MOST_SCALARS:
            return f"its lists of blocks have {numbers} numbers: scalar memory holds {MOST_SCALARS}"
    return None


def sizes(options: Options, q: jax.Array, k: jax.Array, *others) -> BlockSizes:
    """The largest that fit the 16 MiB that a kernel has on a v5e; no longer than the sequences."""
    queries, keys = (LANES * math.ceil(x.shape[1] / LANES) for x in (q, k))
    most = BlockSizes()
    if q.shape[3] * q.dtype.itemsize > 512:
        most = BlockSizes(backward_queries=256, backward_keys=256)
    return BlockSizes(
        min(most.queries, queries), min(most.keys, keys),
        min(most.backward_queries, queries), min(most.backward_keys, keys),
    )  # fmt: skip


def forward(
    options: Options, sizes: BlockSizes, q: jax.Array, k: jax.Array, v: jax.Array, score: Score, mask: Mask | None,
    pairs: None, *, interpret: Any = False,
) -> tuple[tuple[jax.Array, jax.Array | None], jax.Array | None]:  # fmt: skip
    """As `xla.forward`."""
    call = TPUCall.of(options, sizes.queries, sizes.keys, q, k, score, mask, interpret)
    seen, _ = visits(mask, call.sizes)
    query_side = {"q": by_head(q), **call.segments("q")}
    key_side = {"k": by_head(k), "v": by_head(v), **call.segments("k")}
    rows, v_dim = sizes.queries, v.shape[3]

    def kernel(lists, numbers, query_side, key_side, out, saved, scratch):
        example, head, i, n = (pl.program_id(axis) for axis in range(4))
        acc, peak, total, columns = scratch["acc"], scratch["peak"], scratch["total"], scratch["columns"]
        one = call.score_of(numbers, head)

        @pl.when(n == 0)
        def _():
            acc[...], total[...], peak[...] = jnp.zeros_like(acc), jnp.zeros_like(total), jnp.full_like(peak, LEAST)
            fill_columns(columns, query_side)

        def step(j, test):
            visited = call.visited(key_side, "k", j, test)
            of = call.block(columns, visited, i, j, head, test)
            values = visited["v"]
            if score.normalise == "softmax":
                logits = block.logits(one, of)
                new_peak = jnp.maximum(peak[...], logits.max(1, keepdims=True))
                weights, fade = jnp.exp(logits - across(new_peak, logits.shape[1])), jnp.exp(peak[...] - new_peak)
                acc[...] = acc[...] * across(fade, v_dim) + call.dot(weights, values, transposed=True)
                total[...] = total[...] * fade + weights.sum(1, keepdims=True)
                peak[...] = new_peak
            else:
                weights = block.weights(one, of)
                acc[...] += call.dot(weights, values, transposed=True)
                if score.normalise == "sum":
                    total[...] += jnp.broadcast_to(weights.sum(1, keepdims=True), total.shape)

        call.visit(seen, lists, example, i, n, step)

        @pl.when(n == pl.num_programs(3) - 1)
        def _():
            if score.normalise is None:
                out[...] = acc[...].T.astype(out.dtype)
                return
            divisor = jnp.where(total[...] == 0, jnp.inf, total[...])
            out[...] = (acc[...] / across(divisor, v_dim)).T.astype(out.dtype)
            # Without keys log(0), which is −inf.
            saved[...] = as_row(jnp.log(total[...]) + peak[...] if score.normalise == "softmax" else divisor)

    number = pltpu.VMEM((rows, LANES), jnp.float32)
    out, saved = call.run(
        kernel,
        seen,
        query_side,
        key_side,
        name="flash_attention",
        out=(call.of_tokens("q", v_dim, q.dtype), call.of_tokens("q", 1, jnp.float32) if score.normalise else None),
        scratch={
            "acc": pltpu.VMEM((rows, v_dim), jnp.float32),
            "peak": number,
            "total": number,
            "columns": column_scratch(query_side, rows),
        },
        products=q.shape[3] + v_dim,
    )
    saved = None if saved is None else by_token(saved)[..., 0]
    lse, total = (saved, None) if score.normalise == "softmax" else (None, saved)
    return (by_token(out), lse), total


def backward(
    options: Options, sizes: BlockSizes, arrays: tuple, outputs: tuple, total: jax.Array | None, cotangents: tuple, *,
    interpret: Any = False,
) -> tuple:  # fmt: skip
    """As `xla.backward`."""
    q, k, v, score, mask, _ = arrays
    call = TPUCall.of(options, sizes.backward_queries, sizes.backward_keys, q, k, score, mask, interpret)
    of_queries, of_keys = visits(mask, call.sizes)
    query_side = {"q": by_head(q), "d_out": by_head(cotangents[0].astype(q.dtype)), **call.segments("q")}
    key_side = {"k": by_head(k), "v": by_head(v), **call.segments("k")}
    statistics = block.saved_and_delta(score, outputs, total, cotangents, jnp.float32) or ()
    query_side |= {name: by_head(x[..., None]) for name, x in zip(("saved", "delta"), statistics)}
    d_q, d_leaves = _for_queries(call, of_queries, query_side, key_side)
    d_k, d_v = _for_keys(call, of_keys, query_side, key_side)
    return *(by_token(x) for x in (d_q, d_k, d_v)), block.with_parameters(score, d_leaves), None, None


def _for_queries(call: "TPUCall", seen: Visits, query_side: dict, key_side: dict) -> tuple[jax.Array, list[jax.Array]]:
    """Cotangents of the queries, and of the score's parameters `[heads]`, which the kernel sums for every query."""
    rows = call.sizes.query_block
    leaves = block.parameters(call.score)

    def kernel(lists, numbers, query_side, key_side, d_q, d_numbers, scratch):
        example, head, i, n = (pl.program_id(axis) for axis in range(4))
        columns, sums = scratch["columns"], {name: scratch[name] for name in ("acc", "norm", "numbers")}
        one = call.score_of(numbers, head)

        @pl.when(n == 0)
        def _():
            for x in jax.tree.leaves(sums):
                x[...] = jnp.zeros_like(x)
            fill_columns(columns, query_side)

        def step(j, test):
            visited = call.visited(key_side, "k", j, test)
            of = call.block(columns, visited, i, j, head, test)
            d_values = call.dot(columns["d_out"][...], visited["v"])
            saved, delta = (
                across(columns[x][...], of.dot.shape[1]) if x in columns else None for x in ("saved", "delta")
            )
            _, d_dot, d_norm, _, d_score = block.cotangents(one, of, d_values, saved, delta)
            sums["acc"][...] += call.dot(d_dot, visited["k"], transposed=True)
            if d_norm is not None:
                sums["norm"][...] += jnp.broadcast_to(d_norm.sum(1, keepdims=True), sums["norm"].shape)
            for x, y in zip(sums["numbers"], jax.tree.leaves(d_score)):
                x[...] += jnp.broadcast_to(y.sum(1, keepdims=True), x.shape)

        call.visit(seen, lists, example, i, n, step)

        @pl.when(n == pl.num_programs(3) - 1)
        def _():
            found = sums["acc"][...]
            if call.score.needs_norms:
                found += columns["q"][...].astype(jnp.float32) * sums["norm"][:, :1]
            d_q[...] = (call.options.scale * found).T.astype(d_q.dtype)
            for x, y in zip(d_numbers, sums["numbers"]):
                x[...] = as_row(y[:, :1])

    q = query_side["q"]
    number = pltpu.VMEM((rows, LANES), jnp.float32)
    d_q, d_numbers = call.run(
        kernel,
        seen,
        query_side,
        key_side,
        name="flash_attention_queries",
        out=(call.of_tokens("q", q.shape[2], q.dtype), [call.of_tokens("q", 1, jnp.float32) for _ in leaves]),
        scratch={
            "acc": pltpu.VMEM((rows, q.shape[2]), jnp.float32),
            "norm": number if call.score.needs_norms else [],
            "numbers": [number for _ in leaves],
            "columns": column_scratch(query_side, rows),
        },
        products=2 * q.shape[2] + key_side["v"].shape[2],
    )
    return d_q, [x.sum((0, 2, 3)) for x in d_numbers]


def _for_keys(call: "TPUCall", seen: Visits, query_side: dict, key_side: dict) -> tuple[jax.Array, jax.Array]:
    """Cotangents of keys and values, summed over the heads that share them."""
    rows = call.sizes.key_block

    def kernel(lists, numbers, query_side, key_side, d_k, d_v, scratch):
        example, group, j, repeat, n = (pl.program_id(axis) for axis in range(5))
        head = group * call.repeats + repeat
        columns, sums = scratch["columns"], {name: scratch[name] for name in ("k", "v", "norm")}
        one = call.score_of(numbers, head)

        @pl.when((n == 0) & (repeat == 0))
        def _():
            for x in jax.tree.leaves(sums):
                x[...] = jnp.zeros_like(x)
            fill_columns(columns, key_side)

        def step(i, test):
            visited = call.visited(query_side, "q", i, test)
            of = call.block(columns, visited, i, j, head, test, keys_first=True)
            d_values = call.dot(columns["v"][...], visited["d_out"])
            saved, delta = (visited.get(x) for x in ("saved", "delta"))
            weights, d_dot, _, d_norm, _ = block.cotangents(one, of, d_values, saved, delta)
            sums["k"][...] += call.dot(d_dot, visited["q"], transposed=True)
            sums["v"][...] += call.dot(weights, visited["d_out"], transposed=True)
            if d_norm is not None:
                sums["norm"][...] += jnp.broadcast_to(d_norm.sum(1, keepdims=True), sums["norm"].shape)

        call.visit(seen, lists, example, j, n, step)

        @pl.when((n == pl.num_programs(4) - 1) & (repeat == call.repeats - 1))
        def _():
            found = sums["k"][...]
            if call.score.needs_norms:
                found += columns["k"][...].astype(jnp.float32) * sums["norm"][:, :1]
            d_k[...] = (call.options.scale * found).T.astype(d_k.dtype)
            d_v[...] = sums["v"][...].T.astype(d_v.dtype)

    k_dim, v_dim, dtype = key_side["k"].shape[2], key_side["v"].shape[2], key_side["k"].dtype
    return call.run(
        kernel,
        seen,
        query_side,
        key_side,
        name="flash_attention_keys",
        out=(call.of_tokens("k", k_dim, dtype), call.of_tokens("k", v_dim, dtype)),
        scratch={
            "k": pltpu.VMEM((rows, k_dim), jnp.float32),
            "v": pltpu.VMEM((rows, v_dim), jnp.float32),
            "norm": pltpu.VMEM((rows, LANES), jnp.float32) if call.score.needs_norms else [],
            "columns": column_scratch(key_side, rows),
        },
        products=2 * k_dim + 2 * v_dim,
        keys_first=True,
    )


class TPUCall(Call):
    """With arrays `[batch, heads, dim, length]`."""

    def segments(self, side: str) -> dict[str, jax.Array]:
        return {name: x[:, None, None] for name, x in super().segments(side).items()}

    def visited(self, refs: dict, side: str, number: jax.Array, test: bool) -> dict[str, jax.Array]:
        """Block `number` of the visited side; what lies behind the end holds anything, and becomes 0 in matrices."""
        length, size = self.side(side)

        def real(x):
            token = number * size + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
            return jnp.where(token < length, x, jnp.zeros_like(x))

        ragged = test and length % size
        return {name: real(x[...]) if ragged and name in MATRICES else x[...] for name, x in refs.items()}

    def block(
        self, columns: dict, visited: dict, i: jax.Array, j: jax.Array, head: jax.Array, test: bool,
        keys_first: bool = False,
    ) -> Block:  # fmt: skip
        """Query block `i` with key block `j`; `columns` has the side that stays."""
        stays, goes = ("k", "q") if keys_first else ("q", "k")
        product = self.dot(columns[stays][...], visited[goes])
        numbers = {name: x[:, :1] for name, x in columns.items() if name not in MATRICES}
        numbers |= {name: x for name, x in visited.items() if name not in MATRICES}
        if self.score.needs_norms:
            for name, x, axis in ((stays, columns[stays][...], 1), (goes, visited[goes], 0)):
                squares = jnp.square(x.astype(jnp.float32)).sum(axis, keepdims=True)
                numbers[f"{name}_norm"] = self.options.scale / 2 * squares
        row, column = (
            start * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1) if side == stays else (1, size), side != stays)
            for side, start, size in (("q", i, self.sizes.query_block), ("k", j, self.sizes.key_block))
        )
        return self.block_of(product, numbers, row, column, head, test)

    def visit(self, seen: Visits, lists: tuple, example: jax.Array, row: jax.Array, n: jax.Array, step: Any) -> None:
        """Runs `step(number, test)` for the nth block that is visited from `row`, if there is one."""
        order, full, some = lists
        length = seen.order.shape[2]
        place = (example if len(seen.full) > 1 else 0) * seen.full.shape[1] + row
        number = n if seen.in_order else order[place * length + n]
        if same(seen.full) == length:
            step(number, False)
            return
        if seen.fills:
            pl.when(n < full[place])(lambda: step(number, False))
        if seen.tests:
            pl.when((n >= full[place]) & (n < some[place]))(lambda: step(number, True))

    def of_tokens(self, side: str, dim: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """An output of the side that stays."""
        heads, length = (self.heads, self.sizes.queries) if side == "q" else (self.groups, self.sizes.keys)
        return jax.ShapeDtypeStruct((self.batch, heads, dim, length), dtype)

    def run(
        self, kernel: Any, seen: Visits, query_side: dict, key_side: dict, *, name: str, out: tuple, scratch: dict,
        products: int, keys_first: bool = False,
    ) -> tuple:  # fmt: skip
        """Calls `kernel(lists, numbers, query_side, key_side, *outputs, scratch)` over the grid."""
        repeats, examples, row_blocks = self.repeats, len(seen.full), seen.full.shape[1]
        length = seen.order.shape[2]
        grid = (self.batch, self.groups, row_blocks, repeats) if keys_first else (self.batch, self.heads, row_blocks)
        grid += (length,)

        def split(*indices):
            """Example, head, group and the two block numbers, from the grid's indices and the lists."""
            example, head, row, *repeat, n = indices[: len(grid)]
            order, _, some = indices[len(grid) : len(grid) + 3]
            place = (example if examples > 1 else 0) * row_blocks + row
            if same(seen.some) != length:
                # Past the last visit the last block stays where it is: nothing is copied.
                n = jnp.minimum(n, jnp.maximum(some[place] - 1, 0))
            other = n if seen.in_order else order[place * length + n]
            if keys_first:
                return example, head * repeats + repeat[0], head, other, row
            return example, head, jax.lax.div(head, repeats), row, other

        def spec(x, side):
            def index(*indices):
                example, head, group, i, j = split(*indices)
                head = 0 if x.shape[1] == 1 else head if side == "q" else group
                return example if x.shape[0] > 1 else 0, head, 0, i if side == "q" else j

            _, tokens = self.side(side)
            return pl.BlockSpec((None, None, x.shape[2], tokens), index)

        in_specs = [
            {name: spec(x, side) for name, x in of.items()} for side, of in (("q", query_side), ("k", key_side))
        ]
        results, tree = jax.tree.flatten(out)
        out_specs = [spec(x, "k" if keys_first else "q") for x in results]
        leaves = [result(x.shape, x.dtype, (query_side, key_side)) for x in results]
        lists = [jnp.asarray(x).reshape(-1) for x in (seen.listed, seen.full, seen.some)]
        lists, *_ = vary_alike((lists, query_side, key_side))
        numbers = jax.tree.leaves(self.score)
        inputs = [*lists, *numbers]

        def body(*refs):
            prefetched, (query_refs, key_refs, *results, scratch_refs) = refs[: len(inputs)], refs[len(inputs) :]
            outputs = jax.tree.unflatten(tree, results)
            kernel(prefetched[:3], prefetched[3:], query_refs, key_refs, *outputs, scratch_refs)

        found = pl.pallas_call(
            body,
            out_shape=leaves,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(inputs),
                grid=grid,
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=[scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
            ),
            cost_estimate=self.cost(products, (query_side, key_side, leaves)),
            interpret=self.interpret,
            name=name,
        )(*inputs, query_side, key_side)
        return jax.tree.unflatten(tree, found)


def column_scratch(side: dict, size: int) -> dict:
    """For every operand of the side that stays `[size, dim]`, or one number in all lanes."""
    return {name: pltpu.VMEM((size, x.shape[2] if name in MATRICES else LANES), x.dtype) for name, x in side.items()}


def fill_columns(columns: dict, side: dict) -> None:
    """Transposes a block of every operand of the side that stays."""
    for name, column in columns.items():
        x = side[name][...]
        column[...] = x.T if name in MATRICES else jnp.broadcast_to(x, (LANES, x.shape[1])).T
