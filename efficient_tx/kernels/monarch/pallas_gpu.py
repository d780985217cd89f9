"""The Monarch product on GPUs, by Triton: each block-diagonal product is one kernel, the permutations are addresses.

A program computes one tile, of tokens and of one block's outputs. The hidden layer is stored by output groups, with the
token axis last, so that the first product stores and the second one loads whole runs of tokens; the second stores every
l-th number of a row, and programs of neighbouring groups run at the same time and share its lines in the cache. The
products of the backward pass are the same two kernels the other way round, and one that contracts over tokens: its
programs take a share of the tokens each, and these sums are added afterwards.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.monarch.layout import Layout
from efficient_tx.kernels.shapes import result

# Programs that keep every multiprocessor of the largest chip busy, of those that sum over tokens.
PROGRAMS = 256


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens, outputs and inputs of a tile; at least 16, powers of two, and no longer than the axis needs."""

    tokens: int = 64
    outputs: int = 64
    inputs: int = 32
    num_warps: int = 4
    num_stages: int = 3


def unsupported(options: None, x: jax.Array, w1: jax.Array, w2: jax.Array) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    if x.dtype.itemsize > 4 or jnp.issubdtype(x.dtype, jnp.complexfloating):
        return f"its products are of float32, bfloat16 and float16, not {x.dtype.name}"
    return None if x.size else "there are no tokens"


def sizes(options: None, *arrays: jax.Array) -> BlockSizes:
    return BlockSizes()


def forward(
    options: None, sizes: BlockSizes, x: jax.Array, w1: jax.Array, w2: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array | None]:
    """The product `[tokens, s·l]` and what is saved of the hidden layer."""
    plan = Plan(Layout.of(x, w1, w2), sizes, interpret)
    hidden = plan.hide(x, w1)
    return plan.show(hidden, w2), plan.layout.saved(hidden)


def backward(
    options: None, sizes: BlockSizes, arrays: tuple, out: jax.Array, hidden: jax.Array | None, d_out: jax.Array, *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Cotangents of x, w1 and w2."""
    x, w1, w2 = arrays
    plan = Plan(Layout.of(*arrays), sizes, interpret)
    hidden = plan.hide(x, w1) if hidden is None else hidden
    d_hidden = plan.unshow(d_out, w2)
    return plan.unhide(d_hidden, w1), plan.d_w1(d_hidden, x), plan.d_w2(d_out, hidden)


# An index of `[chunk, ...]`, from token numbers, a block's number and numbers within the block; these two are rows and
# columns of a tile in the order of their arrays' shapes.
Index = Callable[[Any, Any, jax.Array], tuple]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels of one call. x is read as `[chunks, c, k, p]`, the output as `[chunks, c, s, l]`."""

    layout: Layout
    sizes: BlockSizes
    interpret: Any

    def natural(self, array: jax.Array, *blocks: int) -> jax.Array:
        return array.reshape(self.layout.chunks, self.layout.c, *blocks)

    def of_input(self, t, block, n):
        return t, block, n

    def of_output(self, t, block, n):
        return t, n, block

    def of_groups(self, t, block, n):
        """The hidden layer `[chunks, l, r, c]` by output groups."""
        return block, n, t

    def of_blocks(self, t, block, n):
        """The hidden layer by input blocks: number k·q of the one order is (r, l) of the other."""
        flat = block * self.layout.q + n
        return flat % self.layout.l, flat // self.layout.l, t

    def hide(self, x, w1):
        m = self.layout
        shape = m.chunks, m.l, m.r, m.c
        x = self.natural(x, m.k, m.p)
        return self.product("hide", x, self.of_input, w1, shape, self.of_blocks)

    def show(self, hidden, w2):
        m = self.layout
        shape = m.chunks, m.c, m.s, m.l
        return self.product("show", hidden, self.of_groups, w2, shape, self.of_output).reshape(m.tokens, -1)

    def unshow(self, d_out, w2):
        m = self.layout
        shape = m.chunks, m.l, m.r, m.c
        d_out = self.natural(d_out, m.s, m.l)
        return self.product("unshow", d_out, self.of_output, w2.mT, shape, self.of_groups)

    def unhide(self, d_hidden, w1):
        m = self.layout
        shape = m.chunks, m.c, m.k, m.p
        return self.product("unhide", d_hidden, self.of_blocks, w1.mT, shape, self.of_input).reshape(m.tokens, -1)

    def d_w1(self, d_hidden, x):
        m = self.layout
        x = self.natural(x, m.k, m.p)
        return self.contraction("d_w1", d_hidden, self.of_blocks, x, self.of_input, (m.k, m.q, m.p))

    def d_w2(self, d_out, hidden):
        m = self.layout
        d_out = self.natural(d_out, m.s, m.l)
        return self.contraction("d_w2", d_out, self.of_output, hidden, self.of_groups, (m.l, m.s, m.r))

    def product(self, name: str, source, at: Index, weight, shape: tuple[int, ...], to: Index) -> jax.Array:
        """out[t, b, n] = Σ_m source[t, b, m] weight[b, n, m], with two indices that say where t, b, n, m are."""
        blocks, outputs, inputs = weight.shape
        tokens, c = self.tile(self.sizes.tokens, self.layout.c), self.layout.c
        columns, depth = self.tile(self.sizes.outputs, outputs), self.tile(self.sizes.inputs, inputs)

        def kernel(source, weight, out):
            # Blocks first: what they read and write of the same tokens shares lines of the cache.
            block, column, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
            chunk, row = row // pl.cdiv(c, tokens), row % pl.cdiv(c, tokens)
            t, n = row * tokens + jnp.arange(tokens), column * columns + jnp.arange(columns)

            def step(number, total):
                m = number * depth + jnp.arange(depth)
                a = read(source, (chunk, *at(t[:, None], block, m[None])), (t[:, None] < c) & (m[None] < inputs))
                b = read(weight, (block, n[None], m[:, None]), (n[None] < outputs) & (m[:, None] < inputs))
                return total + dot(a, b)

            total = jax.lax.fori_loop(0, pl.cdiv(inputs, depth), step, jnp.zeros((tokens, columns), jnp.float32))
            place = out.at[(chunk, *to(t[:, None], block, n[None]))]
            plgpu.store(place, total.astype(out.dtype), mask=(t[:, None] < c) & (n[None] < outputs))

        grid = blocks, pl.cdiv(outputs, columns), self.layout.chunks * pl.cdiv(c, tokens)
        return self.run(kernel, name, grid, shape, source.dtype, source, weight)

    def contraction(self, name: str, left, at: Index, right, other: Index, shape: tuple[int, int, int]) -> jax.Array:
        """d[b, n, m] = Σ_t left[t, b, n] right[t, b, m]."""
        blocks, rows, columns = shape
        tokens, c = self.tile(self.sizes.inputs, self.layout.c), self.layout.c
        tall, wide = self.tile(self.sizes.outputs, rows), self.tile(self.sizes.outputs, columns)
        steps = self.layout.chunks * pl.cdiv(c, tokens)
        tiles = blocks * pl.cdiv(rows, tall) * pl.cdiv(columns, wide)
        parts = max(1, min(steps, PROGRAMS // tiles))
        of_part = pl.cdiv(steps, parts)

        def kernel(left, right, out):
            part, block = pl.program_id(2) // blocks, pl.program_id(2) % blocks
            n = pl.program_id(0) * tall + jnp.arange(tall)
            m = pl.program_id(1) * wide + jnp.arange(wide)

            def step(number, total):
                chunk, row = number // pl.cdiv(c, tokens), number % pl.cdiv(c, tokens)
                t = row * tokens + jnp.arange(tokens)
                a = read(left, (chunk, *at(t[None], block, n[:, None])), (t[None] < c) & (n[:, None] < rows))
                b = read(right, (chunk, *other(t[:, None], block, m[None])), (t[:, None] < c) & (m[None] < columns))
                return total + dot(a, b)

            first = part * of_part
            last = jnp.minimum(first + of_part, steps)
            total = jax.lax.fori_loop(first, last, step, jnp.zeros((tall, wide), jnp.float32))
            place = out.at[part, block, n[:, None], m[None]]
            plgpu.store(place, total, mask=(n[:, None] < rows) & (m[None] < columns))

        grid = pl.cdiv(rows, tall), pl.cdiv(columns, wide), parts * blocks
        return self.run(kernel, name, grid, (parts, *shape), jnp.float32, left, right).sum(0).astype(left.dtype)

    def tile(self, most: int, size: int) -> int:
        return max(16, min(most, pl.next_power_of_2(size)))

    def run(self, kernel, name, grid, shape, dtype, *operands) -> jax.Array:
        moved = sum(x.size * x.dtype.itemsize for x in operands) + math.prod(shape) * jnp.dtype(dtype).itemsize
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=result(shape, dtype, operands),
            compiler_params=plgpu.CompilerParams(num_warps=self.sizes.num_warps, num_stages=self.sizes.num_stages),
            cost_estimate=pl.CostEstimate(flops=self.layout.flops(name), transcendentals=0, bytes_accessed=moved),
            interpret=self.interpret,
            name=f"monarch_{name}",
        )(*operands)


def read(ref: Any, index: tuple, mask: jax.Array) -> jax.Array:
    return plgpu.load(ref.at[index], mask=mask, other=0.0)


dot = partial(
    jax.lax.dot_general,
    dimension_numbers=(((1,), (0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
)
