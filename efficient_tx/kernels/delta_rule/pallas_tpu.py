"""The gated delta rule in chunks for TPUs.

The grid and the layout of the arrays are those of `gated_linear_attention.pallas_tpu`: the state of a head stays in
VMEM over its blocks of tokens, the forward pass reads its inputs once and writes its outputs once, and the errors where
a gradient follows. The backward pass first finds the states at the starts of all chunks, from keys and errors.
"""

from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.kernels.delta_rule.chunk import inverse, matrix
from efficient_tx.kernels.gated_linear_attention import pallas_tpu as linear_attention
from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.gated_linear_attention.pallas_tpu import BlockSizes, Grid, start_from


def unsupported(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None,
    state: jax.Array,
) -> str | None:  # fmt: skip
    """The reason why the kernels do not support the arguments, or None."""
    if beta.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {beta.dtype}: it has float32 and bfloat16"
    return linear_attention.unsupported(options, q, k, v, log_decay, state)


def sizes(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, *_: Any) -> BlockSizes:
    return linear_attention.sizes(options, q, k, v)


def primal(
    options: Options, sizes: BlockSizes, *arrays: jax.Array | None, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
    """Output and the state after the last step, of the arrays that `reference.forward` describes."""
    return forward(options, sizes, *arrays, interpret=interpret, with_errors=False)[0]


def forward(
    options: Options, sizes: BlockSizes, *arrays: jax.Array | None, interpret: Any = False, with_errors: bool = True
) -> tuple[tuple[jax.Array, jax.Array], jax.Array | None]:
    """The results of `primal`, and the errors, None without them."""
    *tokens, log_decay, state = arrays
    grid = Grid.of(options, sizes, (*tokens[:3], log_decay, state), interpret)
    q, k, v, beta, log_decay = grid.steps([*tokens, log_decay])

    def kernel(q, k, v, beta, log_decay, state, out, error, end):
        start_from(state, end)

        def chunk(at):
            decay, start = grid.decay(at.read(log_decay)), end[...]
            q_n, k_n, v_n, beta_n = (at.read(x) for x in (q, k, v, beta))
            solve = inverse(matrix(decay, k_n) * beta_n.T)
            error_n = grid.dot(solve, v_n - grid.dot(k_n * decay.from_start, start, "11"))
            u_n = beta_n * error_n
            if with_errors:
                at.write(error, error_n)
            result = grid.dot(decay.weights(q_n, k_n), u_n) + grid.dot(q_n * decay.from_start, start, "11")
            at.write(out, options.scale * result)
            end[...] = decay.whole * start + grid.dot(u_n, k_n * decay.to_end, "00")

        grid.for_chunks(chunk)

    out, error, end = grid.call(
        kernel, "delta_rule", (q, k, v, beta, log_decay), (state.mT,),
        (grid.like(v, dtype=q.dtype), grid.like(v, dtype=jnp.float32) if with_errors else None), (grid.states(),),
        products=2 * grid.for_weights + 5 + products_of_inverse(sizes.chunk),
    )  # fmt: skip
    return (grid.tokens(out), end.mT), grid.tokens(error) if with_errors else None


def backward(
    options: Options, sizes: BlockSizes, arrays: tuple, outputs: Any, error: jax.Array,
    cotangents: tuple[jax.Array, jax.Array], *, interpret: Any = False,
) -> tuple[jax.Array | None, ...]:  # fmt: skip
    """Cotangents of q, k, v, beta, log_decay and the initial state, from those of the output and the final state."""
    *tokens, log_decay, state = arrays
    grid = Grid.of(options, sizes, (*tokens[:3], log_decay, state), interpret)
    q, k, v, beta, log_decay, error, d_out = grid.steps([*tokens, log_decay, error, cotangents[0]])

    def states(k, beta, log_decay, error, state, starts, end):
        start_from(state, end)

        def chunk(at):
            decay, start = grid.decay(at.read(log_decay)), end[...]
            starts[at.number] = start.astype(starts.dtype)  # products round it anyway
            u_n = at.read(beta) * at.read(error)
            end[...] = decay.whole * start + grid.dot(u_n, at.read(k) * decay.to_end, "00")

        grid.for_chunks(chunk)

    starts, _ = grid.call(
        states, "delta_rule_states", (k, beta, log_decay, error), (state.mT,),
        (grid.states(q.shape[3] // sizes.chunk),), (grid.states(),), products=1,
    )  # fmt: skip

    def kernel(q, k, beta, log_decay, error, d_out, starts, d_end, d_q, d_k, d_v, d_beta, d_log_decay, d_start):
        start_from(d_end, d_start)

        def chunk(at):
            decay, start, d_end = grid.decay(at.read(log_decay)), starts[at.number].astype(jnp.float32), d_start[...]
            q_n, k_n, beta_n, error_n = (at.read(x) for x in (q, k, beta, error))
            d_n, u_n = options.scale * at.read(d_out), beta_n * error_n
            weights, solve = decay.weights(q_n, k_n), inverse(beta_n * matrix(decay, k_n))
            q_start, k_start, k_end = q_n * decay.from_start, k_n * decay.from_start, k_n * decay.to_end

            d_u = grid.dot(weights, d_n, "00") + grid.dot(k_end, d_end, "11")
            g = grid.dot(solve, d_u, "00")
            d_v_n = beta_n * g
            at.write(d_v, d_v_n)
            at.write(d_beta, (g * error_n).sum(1, keepdims=True))

            d_q_n, d_k_n, pairs = decay.pull(q_n, k_n, grid.dot(d_n, u_n, "11"))
            d_matrix = jnp.where(decay.row > decay.column, -grid.dot(d_v_n, u_n, "11"), 0)
            d_k_query, d_k_key, more_pairs = decay.pull(k_n, k_n, d_matrix)
            d_q_start, d_k_start, d_k_end = grid.dot(d_n, start), -grid.dot(d_v_n, start), grid.dot(u_n, d_end)
            at.write(d_q, d_q_n + d_q_start * decay.from_start)
            d_k_n += d_k_query + d_k_key + d_k_start * decay.from_start + d_k_end * decay.to_end
            at.write(d_k, d_k_n)
            if d_log_decay is not None:
                by_start = q_start * d_q_start + k_start * d_k_start
                through = decay.whole * (start * d_end).sum(0, keepdims=True)
                found = decay.d_log_decay(pairs + more_pairs, by_start, k_end * d_k_end, through)
                at.write(d_log_decay, found)
            d_start[...] = decay.whole * d_end + grid.dot(d_n, q_start, "00") - grid.dot(d_v_n, k_start, "00")

        grid.for_chunks(chunk, backwards=True)

    # Of every head, also where heads share keys and values: they are added afterwards.
    of_k, of_v = (x.dtype if x.shape[1] == grid.heads else jnp.float32 for x in (k, v))
    found = (
        grid.like(q), grid.like(k, dtype=of_k), grid.like(v, dtype=of_v), grid.like(beta),
        None if log_decay is None else grid.like(log_decay),
    )  # fmt: skip
    *found, d_start = grid.call(
        kernel, "delta_rule_gradients", (q, k, beta, log_decay, error, d_out, starts), (cotangents[1].mT,), found,
        (grid.states(),), products=6 * grid.for_weights + 9 + products_of_inverse(sizes.chunk), backwards=True,
    )  # fmt: skip
    found = [None if x is None else grid.tokens(x) for x in found]
    for n in (1, 2):
        x = arrays[n]
        if x.shape[2] < grid.heads:
            found[n] = found[n].reshape(*x.shape[:3], -1, x.shape[3]).sum(axis=3).astype(x.dtype)
    return *found, d_start.mT


def products_of_inverse(size: int) -> int:
    return 2 * (size.bit_length() - 2)
