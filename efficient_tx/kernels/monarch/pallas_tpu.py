"""The Monarch product on TPUs: each block-diagonal product is one kernel, the permutations are strided rows of a tile.

A TPU moves whole rows of 128 numbers, so in a tile the token axis is last: the channels are rows, and row number r·l +
l' of the one order is row r of group l' of the other, which is read or written with stride l. The hidden layer has this
layout in main memory too; inputs and outputs are turned round on chip. Only the products of a block are computed, and
those of several narrow blocks by one program.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.monarch.layout import Layout
from efficient_tx.kernels.shapes import result

LANES, ROWS = 128, 16  # of a tile of memory; half as many rows would do in float32
VMEM = 14 << 20  # bytes for the blocks and tiles of a kernel; the smallest grant is 16 MiB
UNROLLED = 4  # output groups of one step of a loop; more code takes longer to compile and is not faster
MOST_BLOCKS = 128  # of a program, whose products are unrolled

# The axes of each kernel's grid that cores may share: not those that it sums over.
MEANING = {
    "hide": ("parallel",) * 3,
    "unhide": ("parallel",) * 3,
    "show": ("parallel",) * 3,
    "unshow": ("parallel", "parallel", "arbitrary"),
    "d_w1": ("parallel", "arbitrary", "arbitrary"),
    "d_w2": ("parallel", "arbitrary", "arbitrary"),
}


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens, input blocks, and outputs of each output group of a tile.

    Tokens are a multiple of 128, and may be more than there are; the others divide their axes.
    """

    tokens: int
    blocks: int
    outputs: int

    def bytes(self, m: Layout, width: int) -> int:
        """Of on-chip memory for the largest of the kernels; the arrays' numbers have `width` bytes.

        Blocks are there twice: one is computed with while the next one is copied. So are tiles: one on its way.
        """
        inputs, hidden, hidden_all = self.blocks * m.p, self.blocks * m.q, m.l * m.r
        outputs = self.outputs * m.l
        first, second = hidden * m.p, outputs * m.r
        by_input = 2 * width * self.tokens * (inputs + hidden) + 2 * 4 * self.tokens * hidden
        by_output = 2 * width * self.tokens * (outputs + hidden_all) + 4 * self.tokens * (2 * outputs + hidden_all)
        return max(by_input + 2 * 4 * first, by_output + 2 * 4 * second)


def unsupported(options: None, x: jax.Array, w1: jax.Array, w2: jax.Array) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"its products are of float32 and bfloat16, not {x.dtype.name}"
    if not x.size:
        return "there are no tokens"
    m = Layout.of(x, w1, w2)
    if m.q % m.l:
        return f"an input block's {m.q} hidden channels cannot be dealt to {m.l} output groups in equal parts"
    least = min(candidates(m), key=lambda sizes: sizes.bytes(m, x.dtype.itemsize))
    if max(least.blocks, m.l) > MOST_BLOCKS:
        return f"a program would have {max(least.blocks, m.l)} products, more than {MOST_BLOCKS}"
    if (need := least.bytes(m, x.dtype.itemsize)) > VMEM:
        return f"its blocks take {need / 2**20:.0f} MiB of on-chip memory, of {VMEM / 2**20:.0f}"
    return None


def sizes(options: None, x: jax.Array, w1: jax.Array, w2: jax.Array) -> BlockSizes:
    """The largest tile that fits, with the smallest number of blocks for whole rows of memory."""
    m = Layout.of(x, w1, w2)
    return next(sizes for sizes in candidates(m) if sizes.bytes(m, x.dtype.itemsize) <= VMEM)


def candidates(m: Layout) -> list[BlockSizes]:
    """The sizes that a TPU's memory allows, best first."""
    shares = [n for n in range(1, m.k) if m.k % n == n * m.p % LANES == n * m.q // m.l % ROWS == 0]
    parts = [n for n in range(m.s, 0, -1) if m.s % n == n * m.l % LANES == n % ROWS == 0]
    tokens = [n for n in (2 * LANES, LANES) if n <= max(m.c, LANES)]
    return [
        BlockSizes(t, blocks, outputs)
        for t in tokens for blocks in [*shares[:1], *[m.k] * (not shares)] for outputs in parts or [m.s]
    ]  # fmt: skip


def forward(
    options: None, sizes: BlockSizes, x: jax.Array, w1: jax.Array, w2: jax.Array, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array | None]:
    """The product `[tokens, s·l]` and what is saved of the hidden layer."""
    plan = Plan(Layout.of(x, w1, w2), sizes, x.dtype, interpret)
    hidden = plan.hide(x, w1)
    return plan.show(hidden, w2), plan.layout.saved(hidden)


def backward(
    options: None, sizes: BlockSizes, arrays: tuple, out: jax.Array, hidden: jax.Array | None, d_out: jax.Array, *,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Cotangents of x, w1 and w2."""
    x, w1, w2 = arrays
    plan = Plan(Layout.of(*arrays), sizes, x.dtype, interpret)
    hidden = plan.hide(x, w1) if hidden is None else hidden
    d_hidden = plan.unshow(d_out, w2)
    return plan.unhide(d_hidden, w1), plan.d_w1(d_hidden, x), plan.d_w2(d_out, hidden)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The kernels of one call. x is read as `[chunks, c, k·p]`, the output as `[chunks, c, s·l]`.

    A kernel's grid has chunks, tiles of tokens, and tiles of input blocks or of outputs. The latter come first where a
    weight's block shall stay on chip for all tokens, or its cotangent be summed over them.
    """

    layout: Layout
    sizes: BlockSizes
    dtype: jnp.dtype
    interpret: Any

    def hide(self, x, w1):
        m = self.layout

        def kernel(x, w1, hidden, rows):
            for i in range(self.sizes.blocks):
                self.put(rows, slice(i * m.q, (i + 1) * m.q), self.dot(w1[i], x[:, i * m.p : (i + 1) * m.p], 1, 1))

            def step(l):
                hidden[l] = self.take(rows, self.of_group(rows, l)).astype(self.dtype)

            self.for_groups(step)

        return self.by_input("hide", kernel, (self.x(x), w1), (m.chunks, m.l, m.r, m.c), "xwh")

    def unhide(self, d_hidden, w1):
        m = self.layout

        def kernel(d_hidden, w1, d_x, rows):
            self.spread(rows, d_hidden)
            for i in range(self.sizes.blocks):
                of_block = self.take(rows, slice(i * m.q, (i + 1) * m.q)).astype(self.dtype)
                d_x[:, i * m.p : (i + 1) * m.p] = self.dot(of_block, w1[i], 0, 0).astype(self.dtype)

        shape = m.chunks, m.c, m.k * m.p
        return self.by_input("unhide", kernel, (d_hidden, w1), shape, "hwx").reshape(m.tokens, -1)

    def d_w1(self, d_hidden, x):
        m = self.layout

        def kernel(d_hidden, x, d_w1, rows):
            self.zero_at_first(d_w1)
            self.spread(rows, d_hidden)
            left = self.left()
            real = self.real(self.take(rows), 1, left).astype(self.dtype)
            for i in range(self.sizes.blocks):
                of_block = self.real(x[:, i * m.p : (i + 1) * m.p], 0, left)
                d_w1[i] += self.dot(real[i * m.q : (i + 1) * m.q], of_block, 1, 0)

        found = self.by_input("d_w1", kernel, (d_hidden, self.x(x)), (m.k, m.q, m.p), "hxw")
        return found.astype(self.dtype)

    def show(self, hidden, w2):
        m = self.layout

        def kernel(hidden, w2, out, rows):
            def step(l):
                self.put(rows, self.of_group(rows, l), self.dot(w2[l], hidden[l], 1, 0))

            self.for_groups(step)
            out[...] = self.take(rows).T.astype(self.dtype)

        shape = m.chunks, m.c, m.s * m.l
        return self.by_output("show", kernel, (hidden, w2), shape, "hwy").reshape(m.tokens, -1)

    def unshow(self, d_out, w2):
        m = self.layout

        def kernel(d_out, w2, d_hidden, rows, total):
            self.zero_at_first(total, (2,))
            self.put(rows, slice(None), d_out[...].astype(jnp.float32).T)

            def step(l):
                total[l] += self.dot(w2[l], self.take(rows, self.of_group(rows, l)).astype(self.dtype), 0, 0)

            self.for_groups(step)

            @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
            def _():
                d_hidden[...] = total[...].astype(self.dtype)

        total = pltpu.VMEM((m.l, m.r, self.sizes.tokens), jnp.float32)
        shape = m.chunks, m.l, m.r, m.c
        return self.by_output("unshow", kernel, (self.y(d_out), w2), shape, "ywh", total)

    def d_w2(self, d_out, hidden):
        m = self.layout

        def kernel(d_out, hidden, d_w2, rows):
            self.zero_at_first(d_w2)
            left = self.left()  # an interpreter does not know a grid's indices within a loop
            self.put(rows, slice(None), self.real(d_out[...].astype(jnp.float32).T, 1, left))

            def step(l):
                d_w2[l] += self.dot(
                    self.take(rows, self.of_group(rows, l)).astype(self.dtype), self.real(hidden[l], 1, left), 1, 1
                )

            self.for_groups(step)

        found = self.by_output("d_w2", kernel, (self.y(d_out), hidden), (m.l, m.s, m.r), "yhw")
        return found.astype(self.dtype)

    def x(self, x):
        return x.reshape(self.layout.chunks, self.layout.c, -1)

    y = x

    def for_groups(self, step) -> None:
        """Calls `step(l)` for every output group: unrolled where they are few, else in a loop of some at a time."""
        groups = self.layout.l
        if groups <= UNROLLED:
            for l in range(groups):
                step(l)
            return
        at_once = next(n for n in (UNROLLED, 2, 1) if groups % n == 0)

        def some(number, _):
            for l in range(at_once):
                step(number * at_once + l)

        jax.lax.fori_loop(0, groups // at_once, some, None)

    def of_group(self, rows, l):
        """The rows of an output group."""
        return pl.ds(l, rows.shape[1] // self.layout.l, self.layout.l)

    def tile(self, channels: int):
        """Scratch memory for channels and tokens, `[tokens / 128, channels, 128]`: strided rows are of 128 lanes."""
        lanes = min(LANES, self.sizes.tokens)
        return pltpu.VMEM((self.sizes.tokens // lanes, channels, lanes), jnp.float32)

    def take(self, rows, where=slice(None)):
        """Some rows of such a tile, `[channels, tokens]`."""
        return jnp.concatenate([rows.at[n][where, :] for n in range(rows.shape[0])], axis=1)

    def put(self, rows, where, value) -> None:
        lanes = rows.shape[2]
        for n in range(rows.shape[0]):
            rows.at[n][where, :] = value[:, n * lanes : (n + 1) * lanes]

    def spread(self, rows, hidden) -> None:
        """Writes the output groups' rows of a tile to their places."""

        def step(l):
            self.put(rows, self.of_group(rows, l), hidden[l].astype(jnp.float32))

        self.for_groups(step)

    def left(self):
        """The number of tokens from the first one of a tile, of a grid whose last axis has the tiles of tokens."""
        return self.layout.c - pl.program_id(2) * self.sizes.tokens

    def real(self, tile, axis: int, left):
        """Zeros beyond the last token; `axis` is that of tokens."""
        if self.layout.c % self.sizes.tokens == 0:
            return tile
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis) < left, tile, 0)

    def zero_at_first(self, total, axes: tuple[int, ...] = (1, 2)) -> None:
        @pl.when(sum(pl.program_id(axis) for axis in axes) == 0)
        def _():
            total[...] = jnp.zeros_like(total)

    def dot(self, a, b, of_a: int, of_b: int):
        precision = jax.lax.Precision.HIGHEST if self.dtype == jnp.float32 else None
        contracted = ((of_a,), (of_b,)), ((), ())
        return jax.lax.dot_general(a, b, contracted, precision=precision, preferred_element_type=jnp.float32)

    def by_input(self, name, kernel, operands, shape, kinds: str):
        """Calls a kernel of tiles of input blocks. `kinds`: its x, w(eight), h(idden) in order, the output last."""
        m, t, n = self.layout, self.sizes.tokens, self.sizes.blocks
        blocks = {
            "x": ((None, t, n * m.p), lambda i, g, j: (g, j, i)),
            "w": ((n, m.q, m.p), lambda i, g, j: (i, 0, 0)),
            "h": ((None, m.l, n * m.q // m.l, t), lambda i, g, j: (g, 0, i, j)),
        }
        grid = m.k // n, m.chunks, math.ceil(m.c / t)
        scratch = [self.tile(n * m.q)]
        return self.run(name, kernel, operands, shape, [blocks[kind] for kind in kinds], grid, scratch)

    def by_output(self, name, kernel, operands, shape, kinds: str, *scratch):
        """The same by tiles of outputs, with y for the output's layout."""
        m, t, n = self.layout, self.sizes.tokens, self.sizes.outputs
        summed = kinds[-1] == "w"
        blocks = {
            "y": ((None, t, n * m.l), lambda g, j, i: (g, j, i)),
            "w": ((m.l, n, m.r), lambda g, j, i: (0, i, 0)),
            "h": ((None, m.l, m.r, t), lambda g, j, i: (g, 0, 0, j)),
        }
        if summed:
            blocks = {kind: (block, lambda i, g, j, at=at: at(g, j, i)) for kind, (block, at) in blocks.items()}
        grid = m.chunks, math.ceil(m.c / t), m.s // n
        grid = (grid[2], *grid[:2]) if summed else grid
        scratch = [self.tile(n * m.l), *scratch]
        return self.run(name, kernel, operands, shape, [blocks[kind] for kind in kinds], grid, scratch)

    def run(self, name, kernel, operands, shape, blocks, grid, scratch):
        *in_specs, out_spec = (pl.BlockSpec(*block) for block in blocks)
        dtype = jnp.float32 if name in ("d_w1", "d_w2") else self.dtype
        moved = sum(x.size * x.dtype.itemsize for x in operands) + math.prod(shape) * jnp.dtype(dtype).itemsize
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_spec,
            out_shape=result(shape, dtype, operands),
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(dimension_semantics=MEANING[name]),
            cost_estimate=pl.CostEstimate(flops=self.layout.flops(name), transcendentals=0, bytes_accessed=moved),
            interpret=self.interpret,
            name=f"monarch_{name}",
        )(*operands)
