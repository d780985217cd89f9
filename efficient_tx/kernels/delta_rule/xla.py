"""The gated delta rule in chunks, in XLA.

With the errors e_t = v_t − k_t exp(log_decay_t) S_{t−1}, of what the state holds of a key, it is gated linear attention
with the values u_t = β_t e_t. So the chunks are those of `gated_linear_attention.xla`, D_ij too: the sum of log decays
of the tokens after j up to i. An error depends on the earlier ones of its chunk, by a linear system:

    (I + M diag(β)) E = V − K' S_start,    M_ij = Σ_c k_ic k_jc exp(D_ijc) for j < i, else 0,  K' = K ⊙ exp(D_·,start).

This is the WY or UT representation of a product of Householder-like matrices (Yang et al. 2024, arXiv 2406.06484; gated
2412.06464; per channel 2510.26692). The inverse of a unit lower triangular matrix is built from its diagonal blocks:
that of two neighbours is

    [A 0; C B]⁻¹ = [A⁻¹ 0; −B⁻¹ C A⁻¹ B⁻¹],    for all pairs at once    X − X N X,

with the inverses of the blocks in X and what separates the pairs in N. The product (I − N)(I + N²)(I + N⁴)…, which is
equal, is not used: for keys that are alike its powers have binomial coefficients, 10¹⁸ in a chunk of 64, and the digits
of the inverse, whose entries are of order 1, are lost.

The backward pass uses the saved errors and recomputes the rest, the states at the starts of the chunks too. With Ū the
cotangent of the values, as in gated linear attention,

    G = (I + diag(β) M)⁻ᵀ Ū,  V̄ = diag(β) G,  β̄_t = Σ_values G ⊙ E,  K̄' = −V̄ S_startᵀ,  M̄ = −V̄ Uᵀ below the diagonal.

The cotangent of the decays follows as there; in M and K', the key k_i is in the place of a query.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.kernels.gated_linear_attention import xla as linear_attention
from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.gated_linear_attention.xla import Chunks, Decays


def unsupported(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, *_: Any) -> str | None:
    """The reason why it does not support the arguments, or None."""
    return linear_attention.unsupported(options, q, k, v)


def sizes(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: Any, *_: Any) -> int:
    """Tokens per chunk, a power of two."""
    return linear_attention.sizes(options, q, k, v, log_decay)


def forward(
    options: Options, size: int, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None,
    state: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:  # fmt: skip
    """Output and the state after the last step, of the arrays that `reference.forward` describes, and the errors.

    The errors are `[batch, length, heads, v_dim]`, in the dtype of the state.
    """
    chunks = Chunks(*q.shape[:2], size, options)
    tokens = prepare(chunks, q, k, v, beta, log_decay, state.dtype)

    def chunk(start, n):
        q_n, k_n, v_n, beta_n, log_decay_n = (chunks.slice(x, n) for x in tokens)
        decays = chunks.decays(log_decay_n)
        solve = inverse(chunks, matrix(chunks, k_n, k_n, decays) * beta_n.mT)
        error = chunks.dot(solve, v_n - chunks.dot(k_n * decays.from_start, start))
        u = beta_n * error
        out = chunks.dot(chunks.weights(q_n, k_n, decays), u) + chunks.dot(q_n * decays.from_start, start)
        end = decays.whole * start + chunks.dot((k_n * decays.to_end).mT, u)
        return end, (chunks.unslice(out), chunks.unslice(error))

    end, (out, error) = jax.lax.scan(chunk, chunks.rows(state), jnp.arange(chunks.count), reverse=options.reverse)
    return (chunks.join(out).astype(q.dtype), end.reshape(state.shape)), chunks.join(error)


def backward(
    options: Options, size: int, arrays: tuple, outputs: Any, error: jax.Array, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    """Cotangents of q, k, v, beta, log_decay and the initial state, from those of the output and the final state."""
    *operands, state = arrays
    d_out, d_end = cotangents
    chunks = Chunks(*error.shape[:2], size, options)
    per_head = operands[4] is not None and operands[4].shape[-1] == 1
    tokens = prepare(chunks, *operands, state.dtype)
    d_out, error = chunks.pad(d_out.astype(state.dtype)), chunks.pad(error)

    def pass_over(start, n):
        k_n, beta_n, error_n, log_decay_n = (chunks.slice(x, n) for x in (tokens[1], tokens[3], error, tokens[4]))
        to_end, whole = chunks.decays_to_end(log_decay_n)
        return whole * start + chunks.dot((k_n * to_end).mT, beta_n * error_n), start

    _, starts = jax.lax.scan(pass_over, chunks.rows(state), jnp.arange(chunks.count), reverse=options.reverse)

    def chunk(d_end, n_and_start):
        n, start = n_and_start
        q_n, k_n, _, beta_n, log_decay_n, error_n, d_n = (chunks.slice(x, n) for x in (*tokens, error, d_out))
        decays = chunks.decays(log_decay_n)
        weights, pull = jax.vjp(lambda q, k: chunks.weights(q, k, decays), q_n, k_n)
        pairs, pull_pairs = jax.vjp(lambda i, j: matrix(chunks, i, j, decays), k_n, k_n)
        q_start, k_start, k_end = q_n * decays.from_start, k_n * decays.from_start, k_n * decays.to_end

        u_n = beta_n * error_n
        d_q, d_k = pull(chunks.dot(d_n, u_n.mT))
        d_u = chunks.dot(weights.mT, d_n) + chunks.dot(k_end, d_end)
        g = chunks.dot(inverse(chunks, beta_n * pairs).mT, d_u)
        d_v, d_beta = beta_n * g, (g * error_n).sum(-1, keepdims=True)
        d_k_query, d_k_key = pull_pairs(-chunks.dot(d_v, u_n.mT))

        d_q += chunks.dot(d_n, start.mT) * decays.from_start
        d_k_query -= chunks.dot(d_v, start.mT) * decays.from_start
        d_k_end = chunks.dot(u_n, d_end.mT) * decays.to_end
        d_k += d_k_key + d_k_end
        d_start = decays.whole * d_end + chunks.dot(q_start.mT, d_n) - chunks.dot(k_start.mT, d_v)
        found = [d_q, d_k + d_k_query, d_v, d_beta]
        if log_decay_n is not None:
            by_end = (k_n * d_k_end).sum(-2) + (decays.whole * start * d_end).sum(-1)
            found.append(chunks.d_log_decay(q_n * d_q + k_n * (d_k_query - d_k), by_end, per_head))
        return d_start, [chunks.unslice(x) for x in found]

    numbered = jnp.arange(chunks.count), starts
    d_start, found = jax.lax.scan(chunk, chunks.rows(d_end), numbered, reverse=not options.reverse)
    found = [*map(chunks.join, found), None][:5]
    found[0] *= options.scale
    for n in (1, 2):
        batch, length, groups, dim = operands[n].shape
        found[n] = found[n].reshape(batch, length, groups, -1, dim).sum(axis=3)
    d_tokens = (None if x is None else d_x.astype(x.dtype) for x, d_x in zip(operands, found))
    return *d_tokens, d_start.reshape(state.shape)


def prepare(chunks: Chunks, q, k, v, beta, log_decay, dtype: jnp.dtype) -> tuple[jax.Array | None, ...]:
    """The tokens as `Chunks.prepare` gives them, with beta."""
    q, k, v, log_decay = chunks.prepare(q, k, v, log_decay, dtype)
    return q, k, v, chunks.pad(beta.astype(dtype)), log_decay


def matrix(chunks: Chunks, i: jax.Array, j: jax.Array, decays: Decays) -> jax.Array:
    """M, `[rows, tokens, tokens]`, of a chunk's keys in the place of queries and as keys."""
    return jnp.where(chunks.levels() >= 0, chunks.weights(i, j, decays), 0)


def inverse(chunks: Chunks, lower: jax.Array) -> jax.Array:
    """The inverse of I + `lower`, which is zero on and above the diagonal; in full float32 (float64) always."""
    levels, dot = chunks.levels(), partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    found = jnp.eye(chunks.size, dtype=lower.dtype) - jnp.where(levels == 0, lower, 0)
    for level in range(1, chunks.size.bit_length() - 1):
        found -= dot(dot(found, jnp.where(levels == level, lower, 0)), found)
    return found
