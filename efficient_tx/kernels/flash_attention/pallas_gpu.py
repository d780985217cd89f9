"""Attention on NVIDIA GPUs: Pallas kernels for Triton, forward, for cotangents of queries and scores, and of keys.

FlashAttention-2 (Dao 2023, arXiv 2307.08691): a program owns a block of queries of one head (in the last kernel a block
of keys of one group) and visits the blocks that the mask does not empty, first those it fills, then those it is tested
in. Everything stays in registers; arrays are read where they lie, `[batch, length, heads, dim]`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.flash_attention import block
from efficient_tx.kernels.flash_attention.block import Block
from efficient_tx.kernels.flash_attention.blocks import Visits, entry, visits
from efficient_tx.kernels.flash_attention.call import LEAST, MATRICES, Call
from efficient_tx.kernels.flash_attention.call import unsupported as reason_against
from efficient_tx.kernels.flash_attention.mask import Mask
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.flash_attention.score import Score
from efficient_tx.kernels.op import vary_alike
from efficient_tx.kernels.shapes import result


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of a program's blocks, powers of two from 16, its warps and pipeline stages.

    Attributes:
      queries, keys: of the forward pass.
      stays, visits: of the backward pass: of the queries, or keys, that a program owns, and of the others.
    """

    queries: int = 128
    keys: int = 64
    stays: int = 64
    visits: int = 64
    warps: int = 8
    stages: int = 2


def unsupported(options: Options, *arrays: Any) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    return reason_against("cuda", options, *arrays)


def sizes(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, *others) -> BlockSizes:
    """Blocks whose sums stay in registers on an A100 and an H100, also with a score and a mask of some length."""
    bytes_of_row = max(padded(q.shape[3]), padded(v.shape[3])) * q.dtype.itemsize
    if q.dtype == jnp.bfloat16 and bytes_of_row <= 256:
        most = BlockSizes() if bytes_of_row <= 128 else BlockSizes(64, visits=32)
    elif bytes_of_row <= 256:
        most = BlockSizes(64, 32, 32, 32)
    else:
        most = BlockSizes(32, 16 if bytes_of_row <= 512 else 32, 32, 16)
    queries, keys = padded(q.shape[1]), padded(k.shape[1])
    return dataclasses.replace(
        most,
        queries=min(most.queries, queries),
        keys=min(most.keys, keys),
        stays=min(most.stays, max(queries, keys)),
        visits=min(most.visits, max(queries, keys)),
    )


def forward(
    options: Options, sizes: BlockSizes, q: jax.Array, k: jax.Array, v: jax.Array, score: Score, mask: Mask | None,
    pairs: None, *, interpret: Any = False,
) -> tuple[tuple[jax.Array, jax.Array | None], jax.Array | None]:  # fmt: skip
    """As `xla.forward`."""
    call = gpu_call(options, sizes, sizes.queries, sizes.keys, q, k, v, score, mask, interpret)
    seen, _ = visits(mask, call.sizes)
    query_side = {"q": q, **call.norms("q", q), **call.segments("q")}
    key_side = {"k": k, "v": v, **call.norms("k", k), **call.segments("k")}

    def kernel(lists, numbers, query_side, key_side, out, saved):
        i, head, example = (pl.program_id(axis) for axis in range(3))
        one = call.score_of(numbers, head)
        stays = call.load(query_side, "q", i)

        def step(j, test, carry):
            acc, total, peak = carry
            visited = call.load(key_side, "k", j, test)
            of = call.block(stays, visited, i, j, head, test)
            if score.normalise == "softmax":
                logits = block.logits(one, of)
                new_peak = jnp.maximum(peak, logits.max(1))
                weights, fade = jnp.exp(logits - new_peak[:, None]), jnp.exp(peak - new_peak)
                acc, total, peak = acc * fade[:, None], total * fade, new_peak
            else:
                weights = block.weights(one, of)
            return acc + call.dot(weights, visited["v"]), total + weights.sum(1), peak

        rows = sizes.queries
        total = jnp.zeros(rows, jnp.float32)
        carry = jnp.zeros((rows, call.v_dim), jnp.float32), total, jnp.full_like(total, LEAST)
        acc, total, peak = call.visit(seen, lists, example, i, step, carry)
        none = total == 0
        divisor = jnp.where(none, jnp.inf, total)
        if score.normalise is None:
            call.store(out, "out", acc, "q", i)
            return
        call.store(out, "out", acc / divisor[:, None], "q", i)
        if score.normalise == "softmax":
            divisor = jnp.where(none, -jnp.inf, jnp.log(divisor) + peak)
        call.store(saved, "saved", divisor, "q", i)

    out, saved = call.run(
        kernel,
        seen,
        query_side,
        key_side,
        name="flash_attention",
        out=({"out": (*q.shape[:3], v.shape[3])}, {"saved": call.of_rows} if score.normalise else {}),
        products=q.shape[3] + v.shape[3],
    )
    saved = saved["saved"].swapaxes(1, 2) if saved else None
    lse, total = (saved, None) if score.normalise == "softmax" else (None, saved)
    return (out["out"], lse), total


def backward(
    options: Options, sizes: BlockSizes, arrays: tuple, outputs: tuple, total: jax.Array | None, cotangents: tuple, *,
    interpret: Any = False,
) -> tuple:  # fmt: skip
    """As `xla.backward`."""
    q, k, v, score, mask, _ = arrays
    for_queries, for_keys = (
        gpu_call(options, sizes, *blocks, *arrays[:5], interpret)
        for blocks in ((sizes.stays, sizes.visits), (sizes.visits, sizes.stays))
    )
    d_out = cotangents[0].astype(q.dtype)
    query_side = {"q": q, "d_out": d_out, **for_keys.norms("q", q), **for_keys.segments("q")}
    key_side = {"k": k, "v": v, **for_keys.norms("k", k), **for_keys.segments("k")}
    statistics = block.saved_and_delta(score, outputs, total, cotangents, jnp.float32) or ()
    query_side |= {name: x.swapaxes(1, 2) for name, x in zip(("saved", "delta"), statistics)}
    d_q, d_leaves = _for_queries(for_queries, visits(mask, for_queries.sizes)[0], query_side, key_side)
    d_k, d_v = _for_keys(for_keys, visits(mask, for_keys.sizes)[1], query_side, key_side)
    return d_q, d_k, d_v, block.with_parameters(score, d_leaves), None, None


def _for_queries(call: "GPUCall", seen: Visits, query_side: dict, key_side: dict) -> tuple[jax.Array, list[jax.Array]]:
    """Cotangents of the queries and of the score's parameters `[heads]`."""
    rows, q = call.sizes.query_block, query_side["q"]
    leaves = block.parameters(call.score)

    def kernel(lists, numbers, query_side, key_side, d_q, d_numbers):
        i, head, example = (pl.program_id(axis) for axis in range(3))
        one = call.score_of(numbers, head)
        stays = call.load(query_side, "q", i)

        def step(j, test, carry):
            acc, norm, sums = carry
            visited = call.load(key_side, "k", j, test)
            of = call.block(stays, visited, i, j, head, test)
            d_values = call.dot(stays["d_out"], visited["v"], transposed=True)
            saved, delta = (stays[x][:, None] if x in stays else None for x in ("saved", "delta"))
            _, d_dot, d_norm, _, d_score = block.cotangents(one, of, d_values, saved, delta)
            acc += call.dot(d_dot, visited["k"])
            norm = norm if d_norm is None else norm + d_norm.sum(1)
            return acc, norm, [x + y.sum() for x, y in zip(sums, jax.tree.leaves(d_score))]

        norm = jnp.zeros(rows, jnp.float32) if call.score.needs_norms else None
        carry = jnp.zeros((rows, call.q_dim), jnp.float32), norm, [jnp.float32(0) for _ in leaves]
        acc, norm, sums = call.visit(seen, lists, example, i, step, carry)
        if norm is not None:
            acc += stays["q"].astype(jnp.float32) * norm[:, None]
        call.store(d_q, "q", call.options.scale * acc, "q", i)
        for name, x in zip(d_numbers, sums):
            d_numbers[name][i] = x

    d_q, d_numbers = call.run(
        kernel,
        seen,
        query_side,
        key_side,
        name="flash_attention_queries",
        out=({"q": q.shape}, {f"number{n}": call.of_blocks for n in range(len(leaves))}),
        products=2 * q.shape[3] + key_side["v"].shape[3],
    )
    return d_q["q"], [x.sum((0, 2)) for x in d_numbers.values()]


def _for_keys(call: "GPUCall", seen: Visits, query_side: dict, key_side: dict) -> tuple[jax.Array, jax.Array]:
    """Cotangents of keys and values, summed over the heads that share them."""
    rows, k, v = call.sizes.key_block, key_side["k"], key_side["v"]

    def kernel(lists, numbers, query_side, key_side, d_keys):
        j, group, example = (pl.program_id(axis) for axis in range(3))
        stays = call.load(key_side, "k", j)

        def of_head(repeat, carry):
            head = group * call.repeats + repeat
            one = call.score_of(numbers, head)

            def step(i, test, carry):
                d_k, d_v, norm = carry
                visited = call.load(query_side, "q", i, test, repeat if call.repeats > 1 else None)
                of = call.block(stays, visited, i, j, head, test, keys_first=True)
                d_values = call.dot(stays["v"], visited["d_out"], transposed=True)
                saved, delta = (visited[x][None] if x in visited else None for x in ("saved", "delta"))
                weights, d_dot, _, d_norm, _ = block.cotangents(one, of, d_values, saved, delta)
                norm = norm if d_norm is None else norm + d_norm.sum(1)
                return d_k + call.dot(d_dot, visited["q"]), d_v + call.dot(weights, visited["d_out"]), norm

            return call.visit(seen, lists, example, j, step, carry)

        norm = jnp.zeros(rows, jnp.float32) if call.score.needs_norms else None
        carry = jnp.zeros((rows, call.q_dim), jnp.float32), jnp.zeros((rows, call.v_dim), jnp.float32), norm
        d_k, d_v, norm = of_head(0, carry) if call.repeats == 1 else jax.lax.fori_loop(0, call.repeats, of_head, carry)
        if norm is not None:
            d_k += stays["k"].astype(jnp.float32) * norm[:, None]
        call.store(d_keys, "k", call.options.scale * d_k, "k", j)
        call.store(d_keys, "v", d_v, "k", j)

    (found,) = call.run(
        kernel,
        seen,
        query_side,
        key_side,
        name="flash_attention_keys",
        out=({"k": k.shape, "v": v.shape},),
        products=2 * k.shape[3] + 2 * v.shape[3],
        keys_first=True,
    )
    return found["k"], found["v"]


@dataclasses.dataclass(frozen=True)
class GPUCall(Call):
    """With arrays as they are; `dims` of the matrices, which are padded to powers of two in registers."""

    programs: BlockSizes
    dims: dict[str, int]
    dtype: jnp.dtype

    @property
    def q_dim(self) -> int:
        return padded(self.dims["q"])

    @property
    def v_dim(self) -> int:
        return padded(self.dims["v"])

    @property
    def of_rows(self) -> tuple[int, ...]:
        return self.batch, self.heads, self.sizes.queries

    @property
    def of_blocks(self) -> tuple[int, ...]:
        return self.batch, self.heads, math.ceil(self.sizes.queries / self.sizes.query_block)

    def norms(self, name: str, x: jax.Array) -> dict[str, jax.Array]:
        """Half the scaled squared norms `[batch, heads, length]`, if the score looks at them.

        Made outside of the kernels: a block of squares takes the registers that the products need.
        """
        if not self.score.needs_norms:
            return {}
        squares = jnp.square(x.astype(jnp.float32)).sum(-1)
        return {f"{name}_norm": self.options.scale / 2 * squares.swapaxes(1, 2)}

    def inside(self, shape: tuple[int, ...], dim: int | None, side: str, number: jax.Array, test: bool) -> Any:
        """Which elements of a block exist, None if all do."""
        length, size = self.side(side)
        inside = None
        if test and length % size:
            inside = number * size + jnp.arange(size) < length
            inside = inside if dim is None else jnp.broadcast_to(inside[:, None], shape)
        if dim is not None and dim != shape[1]:
            dims = jnp.broadcast_to((jnp.arange(shape[1]) < dim)[None], shape)
            inside = dims if inside is None else inside & dims
        return inside

    def load(
        self, refs: dict, side: str, number: jax.Array, test: bool = True, repeat: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Block `number` of a side, zeros behind its end; `repeat`: which of the group's heads, where refs have all."""
        _, size = self.side(side)

        def of(name, ref):
            matrix = name in MATRICES
            rows = pl.ds(number * size, size)
            several = repeat is not None and (matrix or ref.ndim == 2)
            at = (
                (rows, *([repeat] if several else []), slice(None))
                if matrix
                else (*([repeat] if several else []), rows)
            )
            shape = (size, ref.shape[-1]) if matrix else (size,)
            inside = self.inside(shape, self.dims[name] if matrix else None, side, number, test)
            if inside is None:
                return plgpu.load(ref.at[at])
            return plgpu.load(ref.at[at], mask=inside, other=jnp.zeros((), ref.dtype))

        return {name: of(name, ref) for name, ref in refs.items()}

    def store(self, refs: dict, name: str, x: jax.Array, side: str, number: jax.Array) -> None:
        """Block `number` of an output of a side."""
        ref, (_, size) = refs[name], self.side(side)
        dim = self.dims.get(name)
        at = (pl.ds(number * size, size), slice(None)) if x.ndim == 2 else (pl.ds(number * size, size),)
        plgpu.store(ref.at[at], x.astype(ref.dtype), mask=self.inside(x.shape, dim, side, number, True))

    def block(
        self, stays: dict, visited: dict, i: jax.Array, j: jax.Array, head: jax.Array, test: bool,
        keys_first: bool = False,
    ) -> Block:  # fmt: skip
        """Query block `i` with key block `j`."""
        first, second = ("k", "q") if keys_first else ("q", "k")
        product = self.dot(stays[first], visited[second], transposed=True)

        def broadcast(x, side):
            return x[:, None] if side == first else x[None]

        numbers = {}
        for side, of in ((first, stays), (second, visited)):
            numbers |= {name: broadcast(x, side) for name, x in of.items() if name not in MATRICES}
        row, column = (
            broadcast(start * size + jnp.arange(size, dtype=jnp.int32), side)
            for side, start, size in (("q", i, self.sizes.query_block), ("k", j, self.sizes.key_block))
        )
        return self.block_of(product, numbers, row, column, head, test)

    def visit(self, seen: Visits, lists: tuple, example: jax.Array, row: jax.Array, step: Callable, carry: Any) -> Any:
        """Runs `carry = step(number, test, carry)` for all blocks that are visited from `row`."""
        order, *counts = lists
        example = example if len(seen.full) > 1 else 0
        full, some = (entry(of, ref, (example, row)) for of, ref in zip((seen.full, seen.some), counts))

        def visited(n, test, carry):
            return step(n if seen.in_order else order[example, row, n], test, carry)

        if seen.fills:
            carry = jax.lax.fori_loop(0, full, lambda n, carry: visited(n, False, carry), carry)
        if seen.tests:
            carry = jax.lax.fori_loop(full, some, lambda n, carry: visited(n, True, carry), carry)
        return carry

    def run(
        self, kernel: Callable, seen: Visits, query_side: dict, key_side: dict, *, name: str,
        out: tuple[dict[str, tuple[int, ...]], ...], products: int, keys_first: bool = False,
    ) -> tuple[dict[str, jax.Array], ...]:  # fmt: skip
        """Calls `kernel(lists, numbers, query_side, key_side, *outputs)` over row blocks, heads (groups), examples."""
        repeats = self.repeats
        stays = "k" if keys_first else "q"

        def spec(name, shape, side):
            length, size = self.side(side)
            tokens = size * math.ceil(length / size)
            several = repeats if keys_first and side == "q" and repeats > 1 else None

            def index(row, head, example):
                if side == "k" and not keys_first:
                    head = jax.lax.div(head, repeats)
                return example if shape[0] > 1 else 0, head

            if name in MATRICES:
                block = (None, tokens, several, padded(shape[3]))
                return pl.BlockSpec(block, lambda *at: (index(*at)[0], 0, index(*at)[1], 0))
            if len(shape) == 2:
                return pl.BlockSpec((None, tokens), lambda *at: (index(*at)[0], 0))
            if name.startswith("number"):
                return pl.BlockSpec((None, None, shape[2]), lambda *at: (*index(*at), 0))
            return pl.BlockSpec((None, several, tokens), lambda *at: (*index(*at), 0))

        whole = pl.BlockSpec()
        lists, *_ = vary_alike(([jnp.asarray(x) for x in seen], query_side, key_side))
        numbers = jax.tree.leaves(self.score)
        operands = (query_side, key_side)
        kinds = dict.fromkeys(MATRICES, self.dtype)
        found = pl.pallas_call(
            kernel,
            out_shape=[
                {n: result(shape, kinds.get(n, jnp.float32), operands) for n, shape in of.items()} for of in out
            ],
            grid=(seen.full.shape[1], self.groups if keys_first else self.heads, self.batch),
            in_specs=[
                [whole for _ in lists],
                [whole for _ in numbers],
                *(
                    {n: spec(n, x.shape, side) for n, x in of.items()}
                    for side, of in (("q", query_side), ("k", key_side))
                ),
            ],
            out_specs=[{n: spec(n, shape, stays) for n, shape in of.items()} for of in out],
            compiler_params=plgpu.CompilerParams(num_warps=self.programs.warps, num_stages=self.programs.stages),
            cost_estimate=self.cost(products, operands),
            interpret=self.interpret,
            name=name,
        )(lists, numbers, *operands)
        return tuple(found)


def gpu_call(options, programs, query_block, key_block, q, k, v, score, mask, interpret) -> GPUCall:
    dims = {"q": q.shape[3], "k": q.shape[3], "v": v.shape[3], "d_out": v.shape[3], "out": v.shape[3]}
    more = {"programs": programs, "dims": dims, "dtype": q.dtype}
    return GPUCall.of(options, query_block, key_block, q, k, score, mask, interpret, **more)


def padded(size: int) -> int:
    """The next power of two, at least 16: what Triton computes with."""
    return max(16, 1 << (size - 1).bit_length())
