"""Chunked gated linear attention for GPUs, in Triton.

Only the states are computed one chunk after the other, in blocks of the channels of keys and values, which do not
depend on each other; all the rest is parallel over the chunks as well. Three kernels do everything:

    states      the states before all chunks, from keys and values; from queries and the output's cotangent, and from
                the last chunk to the first, the states' cotangents,
    values      the output from the states, the weights of pairs and the values; the other way round, the cotangent of
                the values from the states' cotangents, the weights and the output's cotangent,
    gradients   the cotangents of queries, keys and decays of a block of channels.

No two programs write the same element. Arrays stay as they are, `[batch, length, heads, dim]`; states are transposed,
`[batch, heads, chunks, v_dim, head_dim]`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.gated_linear_attention.chunk import (
    ChannelDecay,
    HeadDecay,
    NoDecay,
    Products,
    bounded,
    levels,
)
from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.shapes import nothing, result


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of the tiles, powers of two, at least 16, and warps of a program.

    Attributes:
      chunk: tokens whose pairs are computed at once.
      keys: channels of queries and keys.
      carried: channels of keys of the states that a program carries.
      values: channels of values.
      warps: of 32 threads.
    """

    chunk: int = 64
    keys: int = 32
    carried: int = 64
    values: int = 64
    warps: int = 8


def unsupported(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, state: jax.Array
) -> str | None:
    """The reason why the kernels do not support the arguments, or None."""
    for x in (q, k, v) if log_decay is None else (q, k, v, log_decay):
        if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"dtype {x.dtype}: it has float32, bfloat16 and float16"
    if not isinstance(options.precision, jax.lax.Precision):
        return f"precision {options.precision}: it has jax.lax.Precision"
    return nothing(q, v)


def fitting(size: int, largest: int) -> int:
    """The side of a tile for so many tokens or channels."""
    return min(largest, max(16, pl.next_power_of_2(size)))


def sizes(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, state: jax.Array
) -> BlockSizes:
    # What the registers of A100 and H100 hold.
    wide = Products.of(options.precision, q, k, v).dtype == jnp.float32
    largest = BlockSizes() if log_decay is None else BlockSizes(keys=16, values=16 if wide else 32)
    return dataclasses.replace(
        largest,
        chunk=fitting(q.shape[1], largest.chunk),
        keys=fitting(q.shape[3], largest.keys),
        carried=fitting(q.shape[3], largest.carried),
        values=fitting(v.shape[3], largest.values),
    )


def forward(
    options: Options, sizes: BlockSizes, *arrays: jax.Array | None, interpret: Any = False
) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
    """Output and the state after the last step, of the arrays that `reference.forward` describes; nothing is saved."""
    q, k, v, log_decay, state = arrays
    call = Call(options, sizes, arrays, interpret)
    starts, end = call.states(k, v, log_decay, state)
    return (call.values(q, k, v, log_decay, starts), end), ()


def backward(
    options: Options, sizes: BlockSizes, arrays: tuple, outputs: Any, saved: Any,
    cotangents: tuple[jax.Array, jax.Array], *, interpret: Any = False,
) -> tuple[jax.Array | None, ...]:  # fmt: skip
    """Cotangents of q, k, v, log_decay and the initial state, from those of the output and the final state."""
    q, k, v, log_decay, state = arrays
    d_out, d_end = cotangents
    call = Call(options, sizes, arrays, interpret)
    starts, _ = call.states(k, v, log_decay, state)
    d_ends, d_start = call.states(q, d_out, log_decay, d_end, backwards=True)
    d_v = call.values(q, k, d_out, log_decay, d_ends, backwards=True)
    d_q, d_k, d_log_decay = call.gradients(q, k, v, log_decay, d_out, starts, d_ends)
    return d_q, shared(d_k, k), shared(d_v, v), d_log_decay, d_start


def shared(x: jax.Array, like: jax.Array) -> jax.Array:
    """The cotangent of keys or values `like`, from one for each head `[batch, length, heads, dim]`."""
    return x if x.shape == like.shape else x.reshape(*like.shape[:3], -1, like.shape[3]).sum(axis=3).astype(like.dtype)


@dataclasses.dataclass(frozen=True)
class Call:
    """The kernels for the arrays of a call; a program is one of (block, head, example)."""

    options: Options
    sizes: BlockSizes
    operands: tuple[jax.Array | None, ...]
    interpret: Any

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Batch, length, heads, head_dim, v_dim."""
        q, _, v, *_ = self.operands
        return (*q.shape, v.shape[3])

    @property
    def dot(self) -> Products:
        return Products.of(self.options.precision, *self.operands[:3])

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Numbers of chunks, and of blocks of the channels of keys and of values."""
        _, length, _, head_dim, v_dim = self.shape
        sizes = self.sizes
        return pl.cdiv(length, sizes.chunk), pl.cdiv(head_dim, sizes.keys), pl.cdiv(v_dim, sizes.values)

    def states(self, x, y, log_decay, state, *, backwards: bool = False) -> tuple[jax.Array, jax.Array]:
        """The states before all chunks and the last one, from `state` `[batch, heads, head_dim, v_dim]`.

        A token adds yᵀ x, decayed by what comes after it. Backwards the chunks go from the last to the first, the
        decays are those up to the token, and x is scaled.
        """
        batch, _, heads, head_dim, v_dim = self.shape
        size, (chunks, _, value_blocks) = self.sizes.chunk, self.blocks
        key_blocks = pl.cdiv(head_dim, self.sizes.carried)

        def kernel(x, y, log_decay, state, before, last):
            part, head, example = (pl.program_id(axis) for axis in range(3))
            keys = channels(jax.lax.rem(part, jnp.int32(key_blocks)), self.sizes.carried)
            values = channels(jax.lax.div(part, jnp.int32(key_blocks)), self.sizes.values)
            own = Head(example, head, heads, self.options.reverse)
            # The rows in such an order that a row's decay is that of the rows up to it.
            row = jnp.arange(size) if backwards else size - 1 - jnp.arange(size)

            def step(n, carry):
                n = chunks - 1 - n if backwards else n
                own.write_state(before, n, values, keys, carry)
                at = n * size + row
                x_n, y_n = own.read(x, at, keys), own.read(y, at, values)
                if backwards:
                    x_n *= self.options.scale
                if log_decay is None:
                    return carry + self.dot(y_n, x_n, "00")
                gates = keys if log_decay.shape[3] > 1 else jnp.arange(1)
                decay = bounded(own.read(log_decay, at, gates))
                whole = jnp.exp(decay.sum(0, keepdims=True))
                if not backwards:
                    decay = bounded(jnp.where(row[:, None] < size - 1, own.read(log_decay, at + 1, gates), 0))
                return whole * carry + self.dot(y_n, x_n * jnp.exp(jnp.cumsum(decay, 0)), "00")

            first = own.read_state(state, 0, values, keys)
            own.write_state(last, 0, values, keys, jax.lax.fori_loop(0, chunks, step, first))

        found, last = self.call(
            kernel, "states", key_blocks * value_blocks, (x, y, log_decay, state.mT[:, :, None]),
            [
                # Products round them anyway.
                ((batch, heads, chunks, v_dim, head_dim), self.dot.dtype),
                ((batch, heads, 1, v_dim, head_dim), jnp.float32),
            ],
            products=1,
        )  # fmt: skip
        return found, last[:, :, 0].mT

    def values(self, q, k, x, log_decay, states, *, backwards: bool = False) -> jax.Array:
        """The output, from values x and the states before all chunks; or the cotangent of values, from that of x."""
        (batch, length, heads, _, v_dim), (chunks, key_blocks, value_blocks) = self.shape, self.blocks

        def kernel(q, k, x, log_decay, states, out):
            part, head, example = (pl.program_id(axis) for axis in range(3))
            n, value_block = jax.lax.rem(part, jnp.int32(chunks)), jax.lax.div(part, jnp.int32(chunks))
            values = channels(value_block, self.sizes.values)
            own = Head(example, head, heads, self.options.reverse)
            at = n * self.sizes.chunk + jnp.arange(self.sizes.chunk)

            def weights_of(block, weights):
                keys = channels(block, self.sizes.keys)
                decay = self.decay(own, log_decay, at, keys)
                return weights + decay.weights(own.read(q, at, keys), own.read(k, at, keys))

            def outside_of(block, found):
                keys = channels(block, self.sizes.keys)
                decay = self.decay(own, log_decay, at, keys)
                ends = own.read(k, at, keys) * decay.to_end if backwards else own.read(q, at, keys) * decay.from_start
                return found + self.dot(ends, own.read_state(states, n, values, keys), "11")

            # Two loops, as registers are few.
            size = self.sizes.chunk
            weights = jax.lax.fori_loop(0, key_blocks, weights_of, jnp.zeros((size, size), jnp.float32))
            found = jnp.zeros((size, self.sizes.values), jnp.float32)
            found = jax.lax.fori_loop(0, key_blocks, outside_of, found)
            x_n, scale = own.read(x, at, values), self.options.scale
            if backwards:
                # The states' cotangents are scaled already.
                found += scale * self.dot(weights, x_n, "00")
            else:
                found = scale * (found + self.dot(weights, x_n))
            own.write(out, at, values, found)

        (out,) = self.call(
            kernel, "values", chunks * value_blocks, (q, k, x, log_decay, states),
            (((batch, length, heads, v_dim), x.dtype if backwards else q.dtype),),
            products=self.for_weights + 2,
        )  # fmt: skip
        return out

    def gradients(self, q, k, v, log_decay, d_out, starts, d_ends) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The cotangents of q, of k for every head, and of log_decay."""
        (_, _, heads, _, _), (chunks, key_blocks, value_blocks) = self.shape, self.blocks
        size = self.sizes.chunk

        def kernel(q, k, v, log_decay, d_out, starts, d_ends, d_q, d_k, d_log_decay):
            part, head, example = (pl.program_id(axis) for axis in range(3))
            n, key_block = jax.lax.rem(part, jnp.int32(chunks)), jax.lax.div(part, jnp.int32(chunks))
            keys = channels(key_block, self.sizes.keys)
            own = Head(example, head, heads, self.options.reverse)
            at = n * size + jnp.arange(size)

            def of_values(block):
                values = channels(block, self.sizes.values)
                return values, own.read(v, at, values), self.options.scale * own.read(d_out, at, values)

            def pairs_of(block, d_weights):
                _, v_n, d_n = of_values(block)
                return d_weights + self.dot(d_n, v_n, "11")

            def outside_of(block, sums):
                (values, v_n, d_n), (d_q_start, d_k_end, through) = of_values(block), sums
                start, d_end = (own.read_state(x, n, values, keys) for x in (starts, d_ends))
                through += (start * d_end).sum(0, keepdims=True)
                return d_q_start + self.dot(d_n, start), d_k_end + self.dot(v_n, d_end), through

            q_n, k_n, decay = own.read(q, at, keys), own.read(k, at, keys), self.decay(own, log_decay, at, keys)
            d_weights = jax.lax.fori_loop(0, value_blocks, pairs_of, jnp.zeros((size, size), jnp.float32))
            d_q_n, d_k_n, pairs = decay.pull(q_n, k_n, d_weights)
            # Values and the output's cotangent are read twice, as registers are few.
            sums = tuple(jnp.zeros((rows, self.sizes.keys), jnp.float32) for rows in (size, size, 1))
            d_q_start, d_k_end, through = jax.lax.fori_loop(0, value_blocks, outside_of, sums)
            d_q_start, d_k_end = d_q_start * decay.from_start, d_k_end * decay.to_end
            own.write(d_q, at, keys, d_q_n + d_q_start)
            own.write(d_k, at, keys, d_k_n + d_k_end)
            if d_log_decay is not None:
                found = decay.d_log_decay(pairs, q_n * d_q_start, k_n * d_k_end, decay.whole * through)
                own.write(d_log_decay, at, keys if log_decay.shape[3] > 1 else key_block + jnp.arange(1), found)

        # Per head: the part of each block of channels.
        per_head = log_decay is not None and log_decay.shape[3] == 1
        of_decay = None
        if log_decay is not None:
            of_decay = (
                ((*log_decay.shape[:3], key_blocks), jnp.float32) if per_head else (log_decay.shape, log_decay.dtype)
            )
        d_q, d_k, d_log_decay = self.call(
            kernel, "gradients", chunks * key_blocks,
            (q, k, v, log_decay, d_out, starts, d_ends),
            ((q.shape, q.dtype), (q.shape, k.dtype), of_decay),
            products=3 * self.for_weights + 3,
        )  # fmt: skip
        if per_head:
            d_log_decay = d_log_decay.sum(3, keepdims=True).astype(log_decay.dtype)
        return d_q, d_k, d_log_decay

    def decay(self, own: "Head", log_decay: Any, at: jax.Array, keys: jax.Array) -> NoDecay:
        """The decays of a chunk."""
        if log_decay is None:
            return NoDecay(self.dot, self.sizes.chunk)
        if log_decay.shape[3] == 1:
            return HeadDecay(self.dot, own.read(log_decay, at, jnp.arange(1)))
        return ChannelDecay(self.dot, own.read(log_decay, at, keys))

    def call(self, kernel, name: str, parts: int, inputs: tuple, results: tuple, products: int) -> list:
        """The results of a kernel of so many programs a head; its cost is estimated from the products of a chunk."""
        batch, length, heads, head_dim, v_dim = self.shape
        results = [None if x is None else result(*x, self.operands) for x in results]
        arrays = [x for x in (*inputs, *results) if x is not None]
        cost = pl.CostEstimate(
            flops=2 * products * batch * length * heads * head_dim * max(self.sizes.chunk, v_dim),
            transcendentals=0 if self.operands[3] is None else 8 * self.operands[3].size,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
        )
        return pl.pallas_call(
            kernel,
            out_shape=results,
            grid=(parts, heads, batch),
            compiler_params=plgpu.CompilerParams(num_warps=self.sizes.warps, num_stages=1),
            cost_estimate=cost,
            interpret=self.interpret,
            name=f"gated_linear_attention_{name}",
        )(*inputs)

    @property
    def for_weights(self) -> int:
        """Products of a chunk for the weights of its pairs."""
        log_decay = self.operands[3]
        return 1 if log_decay is None or log_decay.shape[3] == 1 else levels(self.sizes.chunk)


def channels(block: jax.Array, size: int) -> jax.Array:
    return block * size + jnp.arange(size)


class Head(NamedTuple):
    """The tiles of one head: of tokens in order of the steps, and of channels; outside of the arrays they are zero.

    Attributes:
      example, head: of a program.
      heads: their number; arrays may have fewer, shared ones.
      reverse: whether the first step is at the last token.
    """

    example: jax.Array
    head: jax.Array
    heads: int
    reverse: bool

    def tile(self, x: Any, at: jax.Array, dims: jax.Array) -> tuple[Any, jax.Array]:
        _, length, groups, size = x.shape
        # Not below 0, where an interpreter counts from the end and would write to a real token.
        token = (jnp.where(at < length, length - 1 - at, at) if self.reverse else at)[:, None]
        head = jax.lax.div(self.head, jnp.int32(self.heads // groups))
        return x.at[self.example, token, head, dims[None]], (at < length)[:, None] & (dims < size)[None]

    def read(self, x: Any, at: jax.Array, dims: jax.Array) -> jax.Array:
        tile, inside = self.tile(x, at, dims)
        return plgpu.load(tile, mask=inside, other=0).astype(jnp.float32)

    def write(self, x: Any, at: jax.Array, dims: jax.Array, value: jax.Array):
        tile, inside = self.tile(x, at, dims)
        plgpu.store(tile, value.astype(x.dtype), mask=inside)

    def state(self, x: Any, n: jax.Array, values: jax.Array, keys: jax.Array) -> tuple[Any, jax.Array]:
        *_, v_dim, head_dim = x.shape
        inside = (values < v_dim)[:, None] & (keys < head_dim)[None]
        return x.at[self.example, self.head, n, values[:, None], keys[None]], inside

    def read_state(self, x: Any, n: jax.Array, values: jax.Array, keys: jax.Array) -> jax.Array:
        tile, inside = self.state(x, n, values, keys)
        return plgpu.load(tile, mask=inside, other=0).astype(jnp.float32)

    def write_state(self, x: Any, n: jax.Array, values: jax.Array, keys: jax.Array, value: jax.Array):
        tile, inside = self.state(x, n, values, keys)
        plgpu.store(tile, value.astype(x.dtype), mask=inside)
