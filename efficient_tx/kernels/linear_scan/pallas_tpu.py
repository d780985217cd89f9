"""The linear recurrence on TPUs: blocks of tokens in order, tiles of 8 (bfloat16: 16) tokens by doubling.

The grid runs over examples, blocks of channels and, in order, blocks of tokens; the state stays in VMEM between them. A
tile is one row of registers, in which the prefixes of its tokens follow from two steps at a time: after round r, a row
holds the product of the last 2^r decays and what these tokens added. So a block costs as many steps in a row as it
has tiles, and memory is read and written once. The backward pass, whose formulas are in xla.py, is the same in the
other direction.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.linear_scan import planes
from efficient_tx.kernels.linear_scan.options import Options
from efficient_tx.kernels.linear_scan.planes import Planes
from efficient_tx.kernels.shapes import result


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens, a multiple of 16, and channels, a multiple of 128, of a block."""

    tokens: int = 256
    channels: int = 512


def unsupported(options: Options, x: jax.Array, log_decay: jax.Array, state: jax.Array) -> str | None:
    if jnp.finfo(state.dtype).bits > 32:
        return f"it computes in float32, the dtype is {state.dtype}"
    if jnp.float16 in (x.dtype, log_decay.dtype):
        return "TPUs have no float16"
    return None if x.size else f"there are no tokens in x, whose shape is {x.shape}"


def sizes(options: Options, *arrays: jax.Array) -> BlockSizes:
    return BlockSizes()


def forward(
    options: Options, sizes: BlockSizes, x: jax.Array, log_decay: jax.Array, state: jax.Array, *, interpret: Any = False
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    """The states and the last of them; see `xla.forward`."""
    grid = Grid.of(x, log_decay, reverse=options.reverse, sizes=sizes)
    results = grid.call(
        scan,
        [(x, grid.tokens), (log_decay, grid.tokens), (state[:, None], grid.state)],
        [(x.shape, state.dtype, grid.tokens), (state[:, None].shape, state.dtype, grid.state)],
        interpret,
    )
    return (results[0], results[1][:, 0]), ()


def backward(
    options: Options, sizes: BlockSizes, arrays: tuple, outputs: tuple, saved: tuple, cotangents: tuple,
    *, interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Cotangents of x, log_decay and the initial state; see `xla.backward`."""
    x, log_decay, state = arrays
    states, _ = outputs
    d_states, d_end = cotangents
    grid = Grid.of(x, log_decay, reverse=not options.reverse, sizes=sizes)
    operands = [(d_states, grid.tokens), (log_decay, grid.tokens), (states, grid.tokens), (states, grid.neighbour)]
    states_at_ends = [(state[:, None], grid.state), (d_end[:, None], grid.state)]
    d_x, d_log_decay, d_start = grid.call(
        scan_backward,
        operands + states_at_ends,
        [
            (x.shape, x.dtype, grid.tokens),
            (x.shape, log_decay.dtype, grid.tokens),
            (state[:, None].shape, state.dtype, grid.state),
        ],
        interpret,
    )
    return d_x, d_log_decay, d_start[:, 0]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of a pass over `[batch, length, dim]` and the blocks of its operands.

    Attributes:
      shape: of x.
      rows: tokens of a tile.
      block: tokens of a block, a multiple of `rows`.
      channels: channels of a block.
      reverse: the direction of this pass.
    """

    shape: tuple[int, int, int]
    rows: int
    block: int
    channels: int
    reverse: bool

    @classmethod
    def of(cls, x: jax.Array, log_decay: jax.Array, *, reverse: bool, sizes: BlockSizes) -> "Grid":
        _, length, dim = x.shape
        rows = 8 if min(x.dtype.itemsize, log_decay.dtype.itemsize) > 2 else 16
        return cls(x.shape, rows, min(sizes.tokens, -(-length // 16) * 16), min(sizes.channels, dim), reverse)

    @property
    def blocks(self) -> int:
        return -(-self.shape[1] // self.block)

    def number(self, step: jax.Array) -> jax.Array:
        """Which block of tokens comes at this step."""
        return self.blocks - 1 - step if self.reverse else step

    @property
    def tokens(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, self.block, self.channels), lambda b, c, step: (b, self.number(step), c))

    @property
    def neighbour(self) -> pl.BlockSpec:
        """The tile that a pass in the other direction has just before the block."""
        tiles = self.block // self.rows

        def index(b, c, step):
            n = self.number(step)
            last = -(-self.shape[1] // self.rows) - 1
            return b, jnp.maximum(n * tiles - 1, 0) if self.reverse else jnp.minimum((n + 1) * tiles, last), c

        return pl.BlockSpec((None, self.rows, self.channels), index)

    @property
    def state(self) -> pl.BlockSpec:
        return pl.BlockSpec((None, 1, self.channels), lambda b, c, step: (b, 0, c))

    def call(self, kernel: Callable, operands: list, results: list, interpret: Any) -> list[jax.Array]:
        """Runs `kernel` on pairs of an array and its blocks; results are triples of shape, dtype and blocks."""
        arrays = [planes.split(x) for x, _ in operands]
        parts = [2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1 for _, dtype, _ in results]
        shapes = [(result(shape, jnp.finfo(dtype).dtype, arrays),) * n for (shape, dtype, _), n in zip(results, parts)]
        batch, length, dim = self.shape
        found = pl.pallas_call(
            partial(kernel, self),
            grid=(batch, -(-dim // self.channels), self.blocks),
            in_specs=[(spec,) * len(x) for x, (_, spec) in zip(arrays, operands)],
            out_specs=[(spec,) * n for (*_, spec), n in zip(results, parts)],
            out_shape=shapes,
            scratch_shapes=[(pltpu.VMEM((1, self.channels), jnp.float32),) * parts[-1]],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=20 * batch * length * dim * parts[-1] ** 2,
                transcendentals=batch * length * dim * (2 * parts[-1] - 1),
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((arrays, shapes))),
            ),
            interpret=interpret,
            name=f"linear_{kernel.__name__}",
        )(*arrays)
        return [planes.join(x) for x in found]

    def for_tiles(self, step: jax.Array, carry: Planes, body: Callable) -> None:
        """Runs `body(first row in the block, positions [rows, 1], state)` over the tiles, which returns the state."""
        tiles, first = self.block // self.rows, self.number(step) * self.block
        row = jax.lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)

        def tile(n, state):
            at = pl.multiple_of((tiles - 1 - n if self.reverse else n) * self.rows, self.rows)
            return body(at, first + at + row, state)

        state = jax.lax.fori_loop(0, tiles, tile, tuple(c[...] for c in carry))
        for ref, x in zip(carry, state):
            ref[...] = x

    def load(self, refs: Planes, at: jax.Array, position: jax.Array) -> Planes:
        """The tile at row `at` in float32; zero, which makes an identity step, after the end."""
        real = position < self.shape[1]
        return tuple(jnp.where(real, ref[pl.ds(at, self.rows), :].astype(jnp.float32), 0) for ref in refs)

    def store(self, refs: Planes, at: jax.Array, values: Planes) -> None:
        for ref, x in zip(refs, values):
            ref[pl.ds(at, self.rows), :] = x.astype(ref.dtype)


def scan(grid: Grid, x, log_decay, start, states, end, carry):
    step = pl.program_id(2)
    start_with(carry, start, step)

    def body(at, position, state):
        decay = planes.exp(grid.load(log_decay, at, position))
        found = prefixes(decay, grid.load(x, at, position), state, grid.reverse)
        grid.store(states, at, found)
        return last(found, grid.reverse)

    grid.for_tiles(step, carry, body)
    start_with(end, carry)


def scan_backward(
    grid: Grid, d_states, log_decay, states, neighbour, state, d_end, d_x, d_log_decay, d_start, carry
):  # fmt: skip
    step = pl.program_id(2)
    start_with(carry, d_end, step)
    _, length, _ = grid.shape
    far = grid.block - grid.rows

    def body(at, position, y):
        decay, d_state = (planes.exp(grid.load(log_decay, at, position)), grid.load(d_states, at, position))
        found = prefixes(decay, planes.times(decay, d_state), y, grid.reverse)
        grid.store(d_x, at, planes.plus(d_state, previous(found, y, grid.reverse)))

        # The states before each step: of the tile, of the next one, at the end of the block of its neighbour.
        beside = jnp.maximum(at - grid.rows, 0) if grid.reverse else jnp.minimum(at + grid.rows, far)
        inside = tuple(ref[pl.ds(pl.multiple_of(beside, grid.rows), grid.rows), :] for ref in states)
        outside = tuple(ref[...] for ref in neighbour)
        edge = planes.where(at == (0 if grid.reverse else far), outside, inside)
        own = tuple(ref[pl.ds(at, grid.rows), :] for ref in states)
        before = previous(own, last(edge, not grid.reverse), not grid.reverse)
        first = position == (0 if grid.reverse else length - 1)
        before = planes.where(first, tuple(ref[...] for ref in state), before)
        grid.store(d_log_decay, at, planes.times(found, before))
        return last(found, grid.reverse)

    grid.for_tiles(step, carry, body)
    start_with(d_start, carry)


def start_with(refs: Planes, values: Planes, step: jax.Array | int = 0) -> None:
    """Copies at step 0."""

    @pl.when(step == 0)
    def _():
        for ref, x in zip(refs, values):
            ref[...] = x[...]


def prefixes(decay: Planes, x: Planes, state: Planes, reverse: bool) -> Planes:
    """The states `[rows, channels]` after every row, from the one before the first `[1, channels]`."""
    rows = x[0].shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    if reverse:
        row = rows - 1 - row
    reach = 1
    while reach < rows:
        turn = rows - reach if reverse else reach
        earlier = [tuple(pltpu.roll(p, turn, 0) for p in part) for part in (decay, x)]
        has = row >= reach
        x = planes.plus(x, planes.times(decay, planes.where(has, earlier[1], planes.constant(0, x))))
        decay = planes.times(decay, planes.where(has, earlier[0], planes.constant(1, x)))
        reach *= 2
    return planes.plus(x, planes.times(decay, state))


def previous(x: Planes, first: Planes, reverse: bool) -> Planes:
    """Every row's predecessor, `first` `[1, channels]` for that of the first."""
    rows = x[0].shape[0]
    row = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    rolled = tuple(pltpu.roll(p, rows - 1 if reverse else 1, 0) for p in x)
    return planes.where(row == (rows - 1 if reverse else 0), first, rolled)


def last(x: Planes, reverse: bool) -> Planes:
    return tuple(p[:1] if reverse else p[-1:] for p in x)
