"""Chunked gated linear attention for TPUs.

The grid runs over examples, heads and blocks of tokens, the last one in order. The state stays in VMEM: the forward
pass reads its inputs once and writes its outputs once. A block has several chunks, computed one after the other
(`chunk`). The backward pass first finds the states at the starts of all chunks; then it carries the cotangent of the
state from the last block to the first.

The kernels' arrays are `[batch, heads, dim, tokens]`, in order of the steps and padded to whole blocks: with the tokens
last no head size is padded in memory. States are transposed, `[batch, heads, v_dim, head_dim]`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.gated_linear_attention.chunk import ChannelDecay, HeadDecay, NoDecay, Products, levels
from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.precision import missing
from efficient_tx.kernels.shapes import nothing, result

LARGEST_DIM = 256  # whose tiles fit into 16 MiB of VMEM


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Tokens of a block.

    Attributes:
      chunk: those whose pairs are computed at once, a power of two, at least 16.
      tokens: those of a step of the grid, a multiple of `chunk`.
    """

    chunk: int = 128
    tokens: int = 512


def unsupported(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, state: jax.Array
) -> str | None:
    """The reason why the kernels do not support the arguments, or None."""
    for x in (q, k, v) if log_decay is None else (q, k, v, log_decay):
        if x.dtype not in (jnp.float32, jnp.bfloat16):
            return f"dtype {x.dtype}: it has float32 and bfloat16"
    for name, dim in (("head_dim", q.shape[3]), ("v_dim", v.shape[3])):
        if dim > LARGEST_DIM:
            return f"{name} {dim}: tiles of at most {LARGEST_DIM} fit on the chip"
    if reason := missing(options.precision, "TPU"):
        return reason
    return nothing(q, v)


def sizes(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, *_: Any) -> BlockSizes:
    largest = BlockSizes() if max(q.shape[3], v.shape[3]) <= 128 else BlockSizes(tokens=128)
    chunk = min(largest.chunk, max(16, 1 << (q.shape[1] - 1).bit_length()))
    return BlockSizes(chunk, min(largest.tokens, chunk * -(-q.shape[1] // chunk)))


def forward(
    options: Options, sizes: BlockSizes, *arrays: jax.Array | None, interpret: Any = False
) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
    """Output and the state after the last step, of the arrays that `reference.forward` describes; nothing is saved."""
    grid = Grid.of(options, sizes, arrays, interpret)
    q, k, v, log_decay = grid.steps(arrays[:4])
    state = arrays[4].mT

    def kernel(q, k, v, log_decay, state, out, end):
        start_from(state, end)

        def chunk(at):
            decay, start = grid.decay(at.read(log_decay)), end[...]
            q_n, k_n, v_n = (at.read(x) for x in (q, k, v))
            result = grid.dot(decay.weights(q_n, k_n), v_n) + grid.dot(q_n * decay.from_start, start, "11")
            at.write(out, options.scale * result)
            end[...] = decay.whole * start + grid.dot(v_n, k_n * decay.to_end, "00")

        grid.for_chunks(chunk)

    out, end = grid.call(
        kernel, "gated_linear_attention", (q, k, v, log_decay), (state,), (grid.like(v, dtype=q.dtype),),
        (grid.states(),), products=grid.for_weights + 3,
    )  # fmt: skip
    return (grid.tokens(out), end.mT), ()


def backward(
    options: Options, sizes: BlockSizes, arrays: tuple, outputs: Any, saved: Any,
    cotangents: tuple[jax.Array, jax.Array], *, interpret: Any = False,
) -> tuple[jax.Array | None, ...]:  # fmt: skip
    """Cotangents of q, k, v, log_decay and the initial state, from those of the output and the final state."""
    grid = Grid.of(options, sizes, arrays, interpret)
    q, k, v, log_decay, d_out = grid.steps([*arrays[:4], cotangents[0]])
    state, d_end = arrays[4].mT, cotangents[1].mT

    def states(k, v, log_decay, state, starts, end):
        start_from(state, end)

        def chunk(at):
            decay, start = grid.decay(at.read(log_decay)), end[...]
            starts[at.number] = start.astype(starts.dtype)  # products round it anyway
            end[...] = decay.whole * start + grid.dot(at.read(v), at.read(k) * decay.to_end, "00")

        grid.for_chunks(chunk)

    starts, _ = grid.call(
        states, "gated_linear_attention_states", (k, v, log_decay), (state,),
        (grid.states(q.shape[3] // sizes.chunk),), (grid.states(),), products=1,
    )  # fmt: skip

    def kernel(q, k, v, log_decay, d_out, starts, d_end, d_q, d_k, d_v, d_log_decay, d_start):
        start_from(d_end, d_start)

        def chunk(at):
            decay, start, d_end = grid.decay(at.read(log_decay)), starts[at.number].astype(jnp.float32), d_start[...]
            q_n, k_n, v_n, d_n = (at.read(x) for x in (q, k, v, d_out))
            d_n *= options.scale
            q_start, k_end = q_n * decay.from_start, k_n * decay.to_end
            d_q_start, d_k_end = grid.dot(d_n, start), grid.dot(v_n, d_end)
            d_q_n, d_k_n, pairs = decay.pull(q_n, k_n, grid.dot(d_n, v_n, "11"))
            at.write(d_q, d_q_n + d_q_start * decay.from_start)
            at.write(d_k, d_k_n + d_k_end * decay.to_end)
            at.write(d_v, grid.dot(decay.weights(q_n, k_n), d_n, "00") + grid.dot(k_end, d_end, "11"))
            if d_log_decay is not None:
                through = decay.whole * (start * d_end).sum(0, keepdims=True)
                at.write(d_log_decay, decay.d_log_decay(pairs, q_start * d_q_start, k_end * d_k_end, through))
            d_start[...] = decay.whole * d_end + grid.dot(d_n, q_start, "00")

        grid.for_chunks(chunk, backwards=True)

    # Of every head, also where heads share keys and values: they are added afterwards.
    found = (
        grid.like(q), grid.like(k), grid.like(v),
        None if log_decay is None else grid.like(log_decay),
    )  # fmt: skip
    *found, d_start = grid.call(
        kernel, "gated_linear_attention_gradients", (q, k, v, log_decay, d_out, starts), (d_end,), found,
        (grid.states(),), products=3 * grid.for_weights + 6, backwards=True,
    )  # fmt: skip
    found = [None if x is None else grid.tokens(x) for x in found]
    for n, x in ((1, arrays[1]), (2, arrays[2])):
        if x.shape[2] < grid.heads:
            found[n] = found[n].reshape(*x.shape[:3], -1, x.shape[3]).sum(axis=3).astype(x.dtype)
    return *found, d_start.mT


def start_from(state: Any, carry: Any):
    """At the first block of a head: the carried state is the given one."""

    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = state[...]


class Chunk(NamedTuple):
    """A chunk of the arrays of a block, as tiles `[tokens, dim]`."""

    number: jax.Array
    size: int

    @property
    def tokens(self) -> tuple:
        return slice(None), pl.ds(pl.multiple_of(self.number * self.size, self.size), self.size)

    def read(self, x: Any) -> jax.Array | None:
        return None if x is None else x[self.tokens].astype(jnp.float32).T

    def write(self, x: Any, value: jax.Array):
        x[self.tokens] = value.T.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid (examples, heads, blocks of tokens) of the kernels of a call."""

    options: Options
    sizes: BlockSizes
    batch: int
    length: int
    heads: int
    dot: Products
    operands: tuple[jax.Array | None, ...]
    interpret: Any

    @classmethod
    def of(cls, options: Options, sizes: BlockSizes, arrays: tuple[jax.Array | None, ...], interpret: Any) -> "Grid":
        q, k, v, *_ = arrays
        return cls(options, sizes, *q.shape[:3], Products.of(options.precision, q, k, v), arrays, interpret)

    @property
    def for_weights(self) -> int:
        """Products of a chunk for the weights of its pairs."""
        log_decay = self.operands[3]
        return 1 if log_decay is None or log_decay.shape[3] == 1 else levels(self.sizes.chunk)

    @property
    def blocks(self) -> int:
        return -(-self.length // self.sizes.tokens)

    def steps(self, arrays: list[jax.Array | None]) -> list[jax.Array | None]:
        """Arrays `[batch, length, heads, dim]` as the kernels take them."""

        padding = (0, self.blocks * self.sizes.tokens - self.length)

        def one(x):
            x = jnp.flip(x, 1) if self.options.reverse else x
            return jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), padding))

        return [None if x is None else one(x) for x in arrays]

    def tokens(self, x: jax.Array) -> jax.Array:
        """An array of the kernels as `[batch, length, heads, dim]`."""
        x = x[..., : self.length].transpose(0, 3, 1, 2)
        return jnp.flip(x, 1) if self.options.reverse else x

    def like(self, x: jax.Array, dtype: jnp.dtype | None = None) -> jax.ShapeDtypeStruct:
        """The shape of a result as `x` `[batch, heads, dim, tokens]`, of all heads."""
        return result((self.batch, self.heads, *x.shape[2:]), dtype or x.dtype, self.operands)

    def states(self, *chunks: int) -> jax.ShapeDtypeStruct:
        """The shape of a result of one state a head, or of one a chunk and head."""
        *_, head_dim, v_dim = self.operands[4].shape
        dtype = self.dot.dtype if chunks else jnp.float32
        return result((self.batch, self.heads, *chunks, v_dim, head_dim), dtype, self.operands)

    def decay(self, log_decay: jax.Array | None) -> NoDecay:
        """The decays of a chunk, from its log decays `[tokens, head_dim or 1]`."""
        if log_decay is None:
            return NoDecay(self.dot, self.sizes.chunk)
        return (HeadDecay if log_decay.shape[1] == 1 else ChannelDecay)(self.dot, log_decay)

    def for_chunks(self, body: Callable[[Chunk], None], backwards: bool = False):
        count = self.sizes.tokens // self.sizes.chunk

        def step(n, _):
            body(Chunk(count - 1 - n if backwards else n, self.sizes.chunk))

        jax.lax.fori_loop(0, count, step, None)

    def call(
        self, kernel: Callable, name: str, along: tuple, states: tuple, found: tuple, ends: tuple, *,
        products: int, backwards: bool = False,
    ) -> list[jax.Array | None]:  # fmt: skip
        """The results `found` and `ends` of a kernel; an array may be None.

        Args:
          kernel: function of references to a block of each of the following arrays, in this order.
          name: of the kernel.
          along: inputs with a block per step of the grid, `[batch, heads, dim, tokens]` or `[batch, heads, chunks,
            v_dim, head_dim]`.
          states: inputs with a block per head, `[batch, heads, v_dim, head_dim]`.
          found: shapes of results as `along`.
          ends: shapes of results as `states`; a block stays in memory over the steps of its head.
          products: matrix products per chunk, for the estimate of the cost.
          backwards: whether the steps of a head go from the last to the first.
        """

        def spec(x, moves):
            if x is None:
                return None
            axis, shape, share = 3 if x.ndim == 4 else 2, [None, None, *x.shape[2:]], self.heads // x.shape[1]
            if moves:
                shape[axis] //= self.blocks

            def index(example, head, block):
                at = [example, jax.lax.div(head, jnp.int32(share)), *(0,) * (x.ndim - 2)]
                if moves:
                    at[axis] = self.blocks - 1 - block if backwards else block
                return tuple(at)

            return pl.BlockSpec(shape, index)

        arrays = [x for x in (*along, *states, *found, *ends) if x is not None]
        chunks = self.batch * self.heads * self.blocks * (self.sizes.tokens // self.sizes.chunk)
        *_, head_dim, v_dim = self.operands[4].shape
        cost = pl.CostEstimate(
            flops=2 * products * chunks * self.sizes.chunk * max(self.sizes.chunk, v_dim) * head_dim,
            transcendentals=0 if self.operands[3] is None else 8 * arrays[0].size,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )
        return pl.pallas_call(
            kernel,
            out_shape=[*found, *ends],
            grid=(self.batch, self.heads, self.blocks),
            in_specs=[*(spec(x, True) for x in along), *(spec(x, False) for x in states)],
            out_specs=[*(spec(x, True) for x in found), *(spec(x, False) for x in ends)],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            cost_estimate=cost,
            interpret=self.interpret,
            name=name,
        )(*along, *states)
