"""The linear recurrence on GPUs, in Triton: spans of tokens at the same time, one channel a thread.

One program runs over the tokens of a span, for some channels; a few tokens are loaded at a time, for their loads to be
under way together. A first pass finds what each span makes of a state: its decay and what it adds. These are as few as
there are spans, and an associative scan in XLA gives the state before every span. A second pass computes the states.
Memory is read twice and written once; a sequence of one span needs the second pass only. The backward pass, whose
formulas are in xla.py, is the same in the other direction.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.linear_scan import planes, xla
from efficient_tx.kernels.linear_scan.options import Options
from efficient_tx.kernels.linear_scan.planes import Planes
from efficient_tx.kernels.shapes import result


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Of a program: tokens, how many of them are loaded at a time, which divides the former, channels (2^n), warps."""

    tokens: int = 128
    together: int = 8
    channels: int = 128
    num_warps: int = 2


def unsupported(options: Options, x: jax.Array, log_decay: jax.Array, state: jax.Array) -> str | None:
    if jnp.finfo(state.dtype).bits > 32:
        return f"it computes in float32, the dtype is {state.dtype}"
    return None if x.size else f"there are no tokens in x, whose shape is {x.shape}"


def sizes(options: Options, x: jax.Array, log_decay: jax.Array, state: jax.Array) -> BlockSizes:
    return BlockSizes(together=4) if jnp.iscomplexobj(state) else BlockSizes()


def forward(
    options: Options, sizes: BlockSizes, x: jax.Array, log_decay: jax.Array, state: jax.Array, *, interpret: Any = False
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    """The states and the last of them; see `xla.forward`."""
    grid = Grid(x.shape, sizes, options.reverse, interpret)
    starts = grid.starts(x, log_decay, state, decayed=False)
    states, ends = grid.call(scan, [x, log_decay], [starts], [(grid.tokens, state.dtype), (grid.spans, state.dtype)])
    return (states, xla.last(ends, state, options.reverse)), ()


def backward(
    options: Options, sizes: BlockSizes, arrays: tuple, outputs: tuple, saved: tuple, cotangents: tuple,
    *, interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Cotangents of x, log_decay and the initial state; see `xla.backward`."""
    x, log_decay, state = arrays
    states, _ = outputs
    d_states, d_end = cotangents
    grid = Grid(x.shape, sizes, not options.reverse, interpret)
    starts = grid.starts(d_states, log_decay, d_end, decayed=True)
    d_x, d_log_decay, ends = grid.call(
        scan_backward,
        [d_states, log_decay, states],
        [starts, state[:, None]],
        [(grid.tokens, x.dtype), (grid.tokens, log_decay.dtype), (grid.spans, state.dtype)],
    )
    return d_x, d_log_decay, xla.last(ends, d_end, grid.reverse)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The programs of a pass over `[batch, length, dim]` in one direction: examples × spans × blocks of channels."""

    shape: tuple[int, int, int]
    sizes: BlockSizes
    reverse: bool
    interpret: Any

    @property
    def count(self) -> int:
        return -(-self.shape[1] // self.sizes.tokens)

    @property
    def channels(self) -> int:
        return min(self.sizes.channels, pl.next_power_of_2(self.shape[2]))

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.shape

    @property
    def spans(self) -> tuple[int, int, int]:
        return self.shape[0], self.count, self.shape[2]

    def starts(self, x: jax.Array, log_decay: jax.Array, state: jax.Array, *, decayed: bool) -> jax.Array:
        """The state before every span, `[batch, spans, dim]`; `decayed`: x_t is multiplied by the decay of token t."""
        if self.count == 1:
            return state[:, None]
        kernel = partial(spans, decayed=decayed)
        decay, added = self.call(kernel, [x, log_decay], [], [(self.spans, state.dtype)] * 2)
        return xla.previous(xla.scan(decay, added, state, self.reverse), state, self.reverse)

    def call(self, kernel: Callable, tokens: list, states: list, results: list) -> list[jax.Array]:
        """Runs `kernel` on arrays of tokens and of states `[batch, spans or 1, dim]`; results are shapes and dtypes."""
        operands = [planes.split(x) for x in (*tokens, *states)]
        outs = []
        for shape, dtype in results:
            parts = 2 if jnp.issubdtype(dtype, jnp.complexfloating) else 1
            outs.append((result(shape, jnp.finfo(dtype).dtype, operands),) * parts)

        def spec(x):
            # All rows: which of them a program reads and writes, it says itself.
            return pl.BlockSpec((None, x.shape[1], self.channels), lambda b, n, c: (b, 0, c))

        batch, length, dim = self.shape
        complexity = max(map(len, operands))
        found = pl.pallas_call(
            lambda *refs: kernel(Program(self), *refs),
            grid=(batch, self.count, -(-dim // self.channels)),
            in_specs=jax.tree.map(spec, operands),
            out_specs=jax.tree.map(spec, outs),
            out_shape=outs,
            compiler_params=plgpu.CompilerParams(num_warps=self.sizes.num_warps, num_stages=1),
            cost_estimate=pl.CostEstimate(
                flops=6 * batch * length * dim * complexity**2,
                transcendentals=batch * length * dim * (2 * complexity - 1),
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((operands, outs))),
            ),
            interpret=self.interpret,
            name=f"linear_{getattr(kernel, 'func', kernel).__name__}",
        )(*operands)
        return [planes.join(x) for x in found]


class Program:
    """One program of a grid: what it reads and writes."""

    def __init__(self, grid: Grid):
        self.grid, self.span = grid, pl.program_id(1)
        self.inside = pl.program_id(2) * grid.channels + jnp.arange(grid.channels) < grid.shape[2]

    def for_tokens(self, load: Callable, state: Any, step: Callable) -> Any:
        """`state = step(position, load(position), state)` over the span, and its last state."""
        tokens, together = self.grid.sizes.tokens, self.grid.sizes.together

        def some(i, state):
            steps = [i * together + j for j in range(together)]
            positions = [self.span * tokens + (tokens - 1 - s if self.grid.reverse else s) for s in steps]
            for position, token in zip(positions, [load(p) for p in positions]):
                state = step(position, token, state)
            return state

        return jax.lax.fori_loop(0, tokens // together, some, state)

    def load(self, refs: Planes, row: jax.Array | int) -> Planes:
        """A row in float32; zero, which makes an identity step, before the first and after the last."""
        rows = refs[0].shape[0]
        there = self.inside & (row >= 0) & (row < rows)
        row = jnp.clip(row, 0, rows - 1)
        return tuple(plgpu.load(ref.at[row], mask=there, other=0).astype(jnp.float32) for ref in refs)

    def store(self, refs: Planes, row: jax.Array, values: Planes) -> None:
        there = self.inside & (row < refs[0].shape[0])
        row = jnp.minimum(row, refs[0].shape[0] - 1)
        for ref, x in zip(refs, values):
            plgpu.store(ref.at[row], x.astype(ref.dtype), mask=there)


def spans(program: Program, x, log_decay, decay_out, added_out, *, decayed: bool):
    def load(position):
        return program.load(log_decay, position), program.load(x, position)

    def step(position, token, state):
        decay, x = planes.exp(token[0]), token[1]
        whole, added = state
        added = planes.times(decay, planes.plus(added, x)) if decayed else planes.plus(planes.times(decay, added), x)
        return planes.times(decay, whole), added

    nothing = tuple(jnp.zeros(program.grid.channels, jnp.float32) for _ in decay_out)
    whole, added = program.for_tokens(load, (planes.constant(1, nothing), nothing), step)
    program.store(decay_out, program.span, whole)
    program.store(added_out, program.span, added)


def scan(program: Program, x, log_decay, starts, states, ends):
    def load(position):
        return program.load(log_decay, position), program.load(x, position)

    def step(position, token, state):
        decay, x = planes.exp(token[0]), token[1]
        state = planes.plus(planes.times(decay, state), x)
        program.store(states, position, state)
        return state

    program.store(ends, program.span, program.for_tokens(load, program.load(starts, program.span), step))


def scan_backward(program: Program, d_states, log_decay, states, starts, first_state, d_x, d_log_decay, ends):
    reverse, (_, length, _) = program.grid.reverse, program.grid.shape
    initial = program.load(first_state, 0)

    def load(position):
        before = program.load(states, position - 1 if reverse else position + 1)
        before = planes.where(position == (0 if reverse else length - 1), initial, before)
        return program.load(log_decay, position), program.load(d_states, position), before

    def step(position, token, y):
        log_decay, d_state, before = token
        d_state = planes.plus(d_state, y)
        y = planes.times(planes.exp(log_decay), d_state)
        program.store(d_x, position, d_state)
        program.store(d_log_decay, position, planes.times(y, before))
        return y

    program.store(ends, program.span, program.for_tokens(load, program.load(starts, program.span), step))
