"""The gated delta rule in chunks for GPUs, in Triton.

Layouts and the kernel `states` are those of `gated_linear_attention.pallas_gpu`, with values u_t = β_t e_t; its own are

    systems     the inverse of every chunk's linear system, in parallel,
    weights     the weights of its pairs of queries and keys, in parallel; with decays per channel, also its decayed
                queries and keys,
    errors      the errors and the output, one chunk after the other, for some channels of values,
    cotangents  the same backwards: the cotangents of values, beta and states,
    gradients   the cotangents of queries, keys and decays of a block of channels, in parallel.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from efficient_tx.kernels.delta_rule.chunk import inverse, matrix
from efficient_tx.kernels.gated_linear_attention import pallas_gpu as linear_attention
from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.gated_linear_attention.pallas_gpu import BlockSizes, Call, Head, channels, fitting, shared
from efficient_tx.kernels.shapes import result

LARGEST_HEAD_DIM = 256  # the states of all channels of keys are in a program of `errors` and `cotangents`


def unsupported(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None,
    state: jax.Array,
) -> str | None:  # fmt: skip
    """The reason why the kernels do not support the arguments, or None."""
    if beta.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"dtype {beta.dtype}: it has float32, bfloat16 and float16"
    if q.shape[3] > LARGEST_HEAD_DIM:
        return f"head_dim {q.shape[3]}: tiles of at most {LARGEST_HEAD_DIM} fit on the chip"
    return linear_attention.unsupported(options, q, k, v, log_decay, state)


def sizes(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None, *_: Any
) -> BlockSizes:
    # Larger tiles spill; a tile in which decays are computed needs more registers than one of decayed keys.
    per_channel = log_decay is not None and log_decay.shape[3] > 1
    keys, carried = (fitting(q.shape[3], largest) for largest in ((16, 64) if per_channel else (32, 32)))
    return BlockSizes(fitting(q.shape[1], 32), keys, carried, values=fitting(v.shape[3], 32), warps=4)


def primal(
    options: Options, sizes: BlockSizes, *arrays: jax.Array | None, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Output and the state after the last step, of the arrays that `reference.forward` describes."""
    return forward(options, sizes, *arrays, interpret=interpret, with_errors=False)[0]


def forward(
    options: Options, sizes: BlockSizes, *arrays: jax.Array | None, interpret: Any = False, with_errors: bool = True
) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
    """The results of `primal`, and the errors, None without them."""
    q, k, v, beta, log_decay, state = arrays
    call = Kernels(options, sizes, (q, k, v, log_decay, state), interpret)
    solve, (weights, rows) = call.systems(k, beta, log_decay), call.weights(q, k, log_decay)
    out, error, end = call.errors(solve, weights, rows, v, beta, state, with_errors)
    return (out, end), error


def backward(
    options: Options, sizes: BlockSizes, arrays: tuple, outputs: Any, error: jax.Array,
    cotangents: tuple[jax.Array, jax.Array], *, interpret: Any = False,
) -> tuple[jax.Array | None, ...]:  # fmt: skip
    """Cotangents of q, k, v, beta, log_decay and the initial state, from those of the output and the final state."""
    q, k, v, beta, log_decay, state = arrays
    d_out, d_end = cotangents
    call = Kernels(options, sizes, (q, k, v, log_decay, state), interpret)
    u = call.corrections(beta, error)
    starts, _ = call.states(k, u, log_decay, state)
    solve, (weights, rows) = call.systems(k, beta, log_decay, backwards=True), call.weights(q, k, log_decay)
    d_v, d_beta, d_ends, d_start = call.cotangents(solve, weights, rows, v, beta, error, d_out, d_end)
    d_q, d_k, d_log_decay = call.all_gradients(q, k, u, log_decay, d_out, d_v, starts, d_ends)
    return d_q, shared(d_k, k), shared(d_v, v), d_beta, d_log_decay, d_start


class Rows(NamedTuple):
    """Queries and keys of a call and their decays, or what decays per channel make of these.

    `errors` and `cotangents` compute some channels of values each; from `log_decay` each would compute these anew.

    Attributes:
      q, k, log_decay: those of the call.
      decayed: what `Kernels.decayed` returns, of all chunks, as precise as products read it; empty for other decays.
    """

    q: jax.Array | None = None
    k: jax.Array | None = None
    log_decay: jax.Array | None = None
    decayed: tuple[jax.Array, ...] = ()


class Kernels(Call):
    """The kernels for the arrays of a call; a program is one of (block, head, example)."""

    def corrections(self, beta: jax.Array, error: jax.Array) -> jax.Array:
        """The values u, `[batch, length, heads, v_dim]`, as precise as products read them."""
        return (beta.astype(jnp.float32) * error).astype(self.dot.dtype)

    def systems(self, k, beta, log_decay, *, backwards: bool = False) -> jax.Array:
        """The inverse of I + M diag(β) of every chunk; backwards, of I + diag(β) M."""
        (_, _, heads, _, _), (chunks, key_blocks, _), size = self.shape, self.blocks, self.sizes.chunk

        def kernel(k, beta, log_decay, solve):
            n, head, example = (pl.program_id(axis) for axis in range(3))
            own = Head(example, head, heads, self.options.reverse)
            at, tokens = n * size + jnp.arange(size), jnp.arange(size)

            def step(block, pairs):
                keys = channels(block, self.sizes.keys)
                return pairs + matrix(self.decay(own, log_decay, at, keys), own.read(k, at, keys))

            pairs = jax.lax.fori_loop(0, key_blocks, step, jnp.zeros((size, size), jnp.float32))
            beta_n = own.read(beta, at, jnp.arange(1))
            own.write_state(solve, n, tokens, tokens, inverse(pairs * (beta_n if backwards else beta_n.T)))

        (solve,) = self.launch(kernel, "systems", chunks, (k, beta, log_decay), [self.of_squares])
        return solve

    def weights(self, q, k, log_decay) -> tuple[jax.Array, Rows]:
        """The weights of the pairs of queries and keys of every chunk, and the rows for `errors` and `cotangents`."""
        (batch, _, heads, head_dim, _), (chunks, key_blocks, _), size = self.shape, self.blocks, self.sizes.chunk

        def kernel(q, k, log_decay, weights, *decayed):
            n, head, example = (pl.program_id(axis) for axis in range(3))
            own = Head(example, head, heads, self.options.reverse)
            at, tokens = n * size + jnp.arange(size), jnp.arange(size)

            def step(block, pairs):
                keys = channels(block, self.sizes.keys)
                decay = self.decay(own, log_decay, at, keys)
                q_n, k_n = own.read(q, at, keys), own.read(k, at, keys)
                if decayed:
                    q_start, k_start, k_end, whole = decayed
                    own.write(q_start, at, keys, q_n * decay.from_start)
                    own.write(k_start, at, keys, k_n * decay.from_start)
                    own.write(k_end, at, keys, k_n * decay.to_end)
                    own.write_state(whole, n, jnp.arange(1), keys, decay.whole)
                return pairs + decay.weights(q_n, k_n)

            pairs = jax.lax.fori_loop(0, key_blocks, step, jnp.zeros((size, size), jnp.float32))
            own.write_state(weights, n, tokens, tokens, pairs)

        per_channel, results = log_decay is not None and log_decay.shape[3] > 1, [self.of_squares]
        if per_channel:
            results += 3 * [(q.shape, self.dot.dtype)] + [((batch, heads, chunks, 1, head_dim), jnp.float32)]
        weights, *decayed = self.launch(kernel, "weights", chunks, (q, k, log_decay), results)
        return weights, Rows(decayed=tuple(decayed)) if per_channel else Rows(q, k, log_decay)

    def decayed(self, own: Head, rows: Rows, n: jax.Array, at: jax.Array, keys: jax.Array) -> tuple:
        """Queries and keys of a chunk with the decay since its start, keys with that to its end, and all its decay."""
        if rows.decayed:
            *tiles, whole = rows.decayed
            return *(own.read(x, at, keys) for x in tiles), own.read_state(whole, n, jnp.arange(1), keys)
        q, k, decay = own.read(rows.q, at, keys), own.read(rows.k, at, keys), self.decay(own, rows.log_decay, at, keys)
        return q * decay.from_start, k * decay.from_start, k * decay.to_end, decay.whole

    @property
    def of_squares(self) -> tuple:
        """Shape and dtype of a square of tokens of every chunk, rounded as products round them."""
        batch, _, heads, *_ = self.shape
        return (batch, heads, self.blocks[0], self.sizes.chunk, self.sizes.chunk), self.dot.dtype

    def errors(
        self, solve, weights, rows, v, beta, state, with_errors: bool
    ) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """The output, the errors or None, and the last state. The states between stay on the chip."""
        (_, _, heads, _, v_dim), (chunks, _, value_blocks) = self.shape, self.blocks

        def kernel(solve, weights, rows, v, beta, state, out, error, last):
            block, head, example = (pl.program_id(axis) for axis in range(3))
            values, tokens = channels(block, self.sizes.values), jnp.arange(self.sizes.chunk)
            own = Head(example, head, heads, self.options.reverse)

            def step(n, start):
                at = n * self.sizes.chunk + tokens
                error_n, out_n = own.read(v, at, values), jnp.zeros((tokens.size, values.size), jnp.float32)
                for keys, part in zip(self.every_key, start):
                    q_start, k_start, *_ = self.decayed(own, rows, n, at, keys)
                    error_n -= self.dot(k_start, part, "11")
                    out_n += self.dot(q_start, part, "11")
                error_n = self.dot(own.read_state(solve, n, tokens, tokens), error_n)
                if with_errors:
                    own.write(error, at, values, error_n)
                u_n, end = own.read(beta, at, jnp.arange(1)) * error_n, []
                out_n += self.dot(own.read_state(weights, n, tokens, tokens), u_n)
                own.write(out, at, values, self.options.scale * out_n)
                for keys, part in zip(self.every_key, start):
                    *_, k_end, whole = self.decayed(own, rows, n, at, keys)
                    end.append(whole * part + self.dot(u_n, k_end, "00"))
                return tuple(end)

            end = jax.lax.fori_loop(0, chunks, step, self.read_states(own, state, values))
            self.write_states(own, last, 0, values, end)

        of_values, (_, of_last) = (*self.shape[:3], v_dim), self.of_states
        out, error, last = self.launch(
            kernel, "errors", value_blocks, (solve, weights, rows, v, beta, state.mT[:, :, None]),
            [(of_values, self.operands[0].dtype), (of_values, jnp.float32) if with_errors else None, of_last],
        )  # fmt: skip
        return out, error, last[:, :, 0].mT

    def cotangents(self, solve, weights, rows, v, beta, error, d_out, d_end) -> tuple[jax.Array, ...]:
        """The cotangents of the values for every head, of beta, of the states after all chunks, and of the first."""
        (_, _, heads, _, v_dim), (chunks, _, value_blocks) = self.shape, self.blocks

        def kernel(solve, weights, rows, beta, error, d_out, d_end, d_v, d_beta, d_ends, d_start):
            block, head, example = (pl.program_id(axis) for axis in range(3))
            values, tokens = channels(block, self.sizes.values), jnp.arange(self.sizes.chunk)
            own = Head(example, head, heads, self.options.reverse)

            def step(turn, d_end):
                n = chunks - 1 - turn
                self.write_states(own, d_ends, n, values, d_end)
                at = n * self.sizes.chunk + tokens
                d_n = self.options.scale * own.read(d_out, at, values)
                d_u = self.dot(own.read_state(weights, n, tokens, tokens), d_n, "00")
                for keys, part in zip(self.every_key, d_end):
                    *_, k_end, _ = self.decayed(own, rows, n, at, keys)
                    d_u += self.dot(k_end, part, "11")
                g = self.dot(own.read_state(solve, n, tokens, tokens), d_u, "00")
                by_beta = (g * own.read(error, at, values)).sum(1, keepdims=True)
                own.write(d_beta, at, block + jnp.arange(1), by_beta)
                d_v_n, d_start = own.read(beta, at, jnp.arange(1)) * g, []
                own.write(d_v, at, values, d_v_n)
                for keys, part in zip(self.every_key, d_end):
                    q_start, k_start, _, whole = self.decayed(own, rows, n, at, keys)
                    part = whole * part + self.dot(d_n, q_start, "00")
                    d_start.append(part - self.dot(d_v_n, k_start, "00"))
                return tuple(d_start)

            found = jax.lax.fori_loop(0, chunks, step, self.read_states(own, d_end, values))
            self.write_states(own, d_start, 0, values, found)

        d_v, d_beta, d_ends, d_start = self.launch(
            kernel, "cotangents", value_blocks,
            (solve, weights, rows, beta, error, d_out, d_end.mT[:, :, None]),
            [
                ((*self.shape[:3], v_dim), v.dtype),
                ((*self.shape[:3], value_blocks), jnp.float32),
                *self.of_states,
            ],
        )  # fmt: skip
        return d_v, d_beta.sum(3, keepdims=True).astype(beta.dtype), d_ends, d_start[:, :, 0].mT

    @property
    def of_states(self) -> list[tuple]:
        """Shape and dtype of the states of all chunks, rounded as products round them, and of one."""
        batch, _, heads, head_dim, v_dim = self.shape
        counts = (self.blocks[0], self.dot.dtype), (1, jnp.float32)
        return [((batch, heads, count, v_dim, head_dim), dtype) for count, dtype in counts]

    @property
    def every_key(self) -> list[jax.Array]:
        """All channels of keys, in blocks."""
        count = pl.cdiv(self.shape[3], self.sizes.carried)
        return [channels(jnp.int32(block), self.sizes.carried) for block in range(count)]

    def read_states(self, own: Head, state: Any, values: jax.Array) -> tuple[jax.Array, ...]:
        """A head's state for some channels of values, in blocks of those of keys."""
        return tuple(own.read_state(state, 0, values, keys) for keys in self.every_key)

    def write_states(self, own: Head, states: Any, n: jax.Array | int, values: jax.Array, parts: tuple) -> None:
        for keys, part in zip(self.every_key, parts):
            own.write_state(states, n, values, keys, part)

    def all_gradients(self, q, k, u, log_decay, d_out, d_v, starts, d_ends) -> tuple[jax.Array | None, ...]:
        """The cotangents of q, of k for every head, and of log_decay."""
        (_, _, heads, _, _), (chunks, key_blocks, value_blocks) = self.shape, self.blocks
        size = self.sizes.chunk

        def kernel(q, k, u, log_decay, d_out, d_v, starts, d_ends, d_q, d_k, d_log_decay):
            part, head, example = (pl.program_id(axis) for axis in range(3))
            n, key_block = jax.lax.rem(part, jnp.int32(chunks)), jax.lax.div(part, jnp.int32(chunks))
            keys, at = channels(key_block, self.sizes.keys), n * size + jnp.arange(size)
            own = Head(example, head, heads, self.options.reverse)

            def of_values(block):
                values = channels(block, self.sizes.values)
                d_n = self.options.scale * own.read(d_out, at, values)
                return values, own.read(u, at, values), d_n, own.read(d_v, at, values)

            def weights_of(block, d_weights):
                _, u_n, d_n, _ = of_values(block)
                return d_weights + self.dot(d_n, u_n, "11")

            def matrix_of(block, d_matrix):
                _, u_n, _, d_v_n = of_values(block)
                return d_matrix - self.dot(d_v_n, u_n, "11")

            def outside_of(block, sums):
                (values, u_n, d_n, d_v_n), (d_q_start, d_k_start, d_k_end, through) = of_values(block), sums
                start, d_end = (own.read_state(x, n, values, keys) for x in (starts, d_ends))
                return (
                    d_q_start + self.dot(d_n, start),
                    d_k_start - self.dot(d_v_n, start),
                    d_k_end + self.dot(u_n, d_end),
                    through + (start * d_end).sum(0, keepdims=True),
                )

            # One after the other, and values once more each time, as registers are few.
            q_n, k_n, decay = own.read(q, at, keys), own.read(k, at, keys), self.decay(own, log_decay, at, keys)
            nothing = jnp.zeros((size, size), jnp.float32)
            d_weights = jax.lax.fori_loop(0, value_blocks, weights_of, nothing)
            d_q_n, d_k_n, pairs = decay.pull(q_n, k_n, d_weights)
            d_matrix = jax.lax.fori_loop(0, value_blocks, matrix_of, nothing)
            d_matrix = jnp.where(decay.row > decay.column, d_matrix, 0)
            d_k_query, d_k_key, more_pairs = decay.pull(k_n, k_n, d_matrix)
            d_k_n += d_k_query + d_k_key
            sums = tuple(jnp.zeros((rows, self.sizes.keys), jnp.float32) for rows in (size, size, size, 1))
            d_q_start, d_k_start, d_k_end, through = jax.lax.fori_loop(0, value_blocks, outside_of, sums)
            d_q_start, d_k_start = d_q_start * decay.from_start, d_k_start * decay.from_start
            d_k_end *= decay.to_end
            own.write(d_q, at, keys, d_q_n + d_q_start)
            own.write(d_k, at, keys, d_k_n + d_k_start + d_k_end)
            if d_log_decay is not None:
                by_start = q_n * d_q_start + k_n * d_k_start
                found = decay.d_log_decay(pairs + more_pairs, by_start, k_n * d_k_end, decay.whole * through)
                own.write(d_log_decay, at, keys if log_decay.shape[3] > 1 else key_block + jnp.arange(1), found)

        # Per head: the part of each block of channels.
        per_head, of_decay = log_decay is not None and log_decay.shape[3] == 1, None
        if log_decay is not None:
            of_decay = (log_decay.shape, log_decay.dtype)
            if per_head:
                of_decay = ((*log_decay.shape[:3], key_blocks), jnp.float32)
        d_q, d_k, d_log_decay = self.launch(
            kernel, "gradients", chunks * key_blocks, (q, k, u, log_decay, d_out, d_v, starts, d_ends),
            [(q.shape, q.dtype), (q.shape, k.dtype), of_decay],
        )  # fmt: skip
        if per_head:
            d_log_decay = d_log_decay.sum(3, keepdims=True).astype(log_decay.dtype)
        return d_q, d_k, d_log_decay

    def launch(self, kernel, name: str, parts: int, inputs: tuple, results: list) -> list[jax.Array | None]:
        """Runs a kernel; arrays, and results as shape and dtype, may be None."""
        batch, _, heads, *_ = self.shape
        shapes = [None if x is None else result(*x, self.operands) for x in results]
        arrays = jax.tree.leaves((inputs, shapes))
        *_, head_dim, v_dim = self.operands[4].shape
        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid=(parts, heads, batch),
            compiler_params=plgpu.CompilerParams(num_warps=self.sizes.warps, num_stages=1),
            cost_estimate=pl.CostEstimate(
                flops=8 * batch * self.shape[1] * heads * self.sizes.chunk * max(head_dim, v_dim),
                transcendentals=0 if self.operands[3] is None else 8 * self.operands[3].size,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in arrays),
            ),
            interpret=self.interpret,
            name=f"delta_rule_{name}",
        )(*inputs)
