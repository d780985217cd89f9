"""The gated delta rule in chunks, in XLA.

With the corrections u_t = β_t (v_t − k_t exp(log_decay_t) S_{t−1}) in the place of values it is gated linear attention,
and the chunks are those of `gated_linear_attention.xla`, D_ij too: the sum of log decays of the tokens after j up to i.
The corrections of a chunk solve a linear system, since each depends on the earlier ones of its chunk:

    (I + diag(β) M) U = diag(β) (V − K' S_start),    M_ij = Σ_c k_ic k_jc exp(D_ijc) for j < i, K' = K ⊙ exp(D_·,start).

This is the WY or UT representation of a product of Householder-like matrices (Yang et al. 2024, arXiv 2406.06484; gated
2412.06464; per channel 2510.26692). The inverse of a unit lower triangular matrix is built from its diagonal blocks:
that of two neighbours is

    [A 0; C B]⁻¹ = [A⁻¹ 0; −B⁻¹ C A⁻¹ B⁻¹],    for all pairs at once    X − X N X,

with the inverses of the blocks in X and what separates the pairs in N. The product (I − N)(I + N²)(I + N⁴)…, which is
equal, is not used: for keys that are alike its powers have binomial coefficients, 10¹⁸ in a chunk of 64, and the digits
of the inverse, whose entries are of order 1, are lost.

The backward pass uses the saved corrections and recomputes the rest, the states at the starts of the chunks too. With X
the inverse, Ū = (cotangent of the corrections as values), G = Xᵀ Ū and R̄ = diag(β) G,

    V̄ = R̄,  K̄' = −R̄ S_startᵀ,  M̄ = −R̄ Uᵀ below the diagonal,  β̄_t = Σ_values G ⊙ (V − K' S_start − M U).

The cotangent of the decays follows as in gated linear attention; in M and K', the key k_i is in the place of a query.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.gated_linear_attention.xla import Chunks, Decays

# Tokens per chunk, with a decay per head and per channel.
CHUNK, CHANNEL_CHUNK = 64, 32


def unsupported(options: Options, *arrays: jax.Array | None) -> None:
    """It supports everything."""


def sizes(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: Any, *_: Any) -> int:
    """Tokens per chunk, a power of two."""
    largest = CHUNK if log_decay is None or log_decay.shape[-1] == 1 else CHANNEL_CHUNK
    return min(largest, max(2, 1 << (q.shape[1] - 1).bit_length()))


def forward(
    options: Options, size: int, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None,
    state: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:  # fmt: skip
    """Output and the state after the last step, of the arrays that `reference.forward` describes, and the corrections.

    The corrections u are `[batch, length, heads, v_dim]`, in the dtype of the state.
    """
    chunks = Chunks(q.shape[1], size, options)
    tokens = prepare(chunks, q, k, v, beta, log_decay, state.dtype)

    def chunk(start, n):
        q_n, k_n, v_n, beta_n, log_decay_n = (chunks.slice(x, n) for x in tokens)
        decays = chunks.decays(log_decay_n)
        system = System.of(chunks, k_n, beta_n, decays)
        u = chunks.dot(system.inverse, beta_n * (v_n - chunks.dot(k_n * decays.from_start, start)))
        out = chunks.dot(chunks.weights(q_n, k_n, decays), u) + chunks.dot(q_n * decays.from_start, start)
        end = decays.whole * start + chunks.dot((k_n * decays.to_end).mT, u)
        return end, (chunks.unslice(out), chunks.unslice(u))

    end, (out, u) = jax.lax.scan(chunk, state, jnp.arange(chunks.count), reverse=options.reverse)
    return (chunks.join(out).astype(q.dtype), end), chunks.join(u)


def backward(
    options: Options, size: int, arrays: tuple, outputs: Any, u: jax.Array, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    """Cotangents of q, k, v, beta, log_decay and the initial state, from those of the output and the final state."""
    *operands, state = arrays
    d_out, d_end = cotangents
    chunks = Chunks(u.shape[1], size, options)
    per_head = operands[4] is not None and operands[4].shape[-1] == 1
    tokens = prepare(chunks, *operands, state.dtype)
    d_out, u = chunks.pad(d_out.astype(state.dtype)), chunks.pad(u)

    def pass_over(start, n):
        k_n, u_n, log_decay_n = (chunks.slice(x, n) for x in (tokens[1], u, tokens[4]))
        to_end, whole = chunks.decays_to_end(log_decay_n)
        return whole * start + chunks.dot((k_n * to_end).mT, u_n), start

    _, starts = jax.lax.scan(pass_over, state, jnp.arange(chunks.count), reverse=options.reverse)

    def chunk(d_end, n_and_start):
        n, start = n_and_start
        q_n, k_n, v_n, beta_n, log_decay_n, u_n, d_n = (chunks.slice(x, n) for x in (*tokens, u, d_out))
        decays = chunks.decays(log_decay_n)
        system = System.of(chunks, k_n, beta_n, decays)
        weights, pull = jax.vjp(lambda q, k: chunks.weights(q, k, decays), q_n, k_n)
        q_start, k_start, k_end = q_n * decays.from_start, k_n * decays.from_start, k_n * decays.to_end

        d_q, d_k = pull(chunks.dot(d_n, u_n.mT))
        g = chunks.dot(system.inverse.mT, chunks.dot(weights.mT, d_n) + chunks.dot(k_end, d_end))
        rest = v_n - chunks.dot(k_start, start) - chunks.dot(system.matrix, u_n)
        d_v, d_beta = beta_n * g, (g * rest).sum(-1, keepdims=True)
        d_k_query, d_k_key = system.pull(-chunks.dot(d_v, u_n.mT))

        d_q += chunks.dot(d_n, start.mT) * decays.from_start
        d_k_query -= chunks.dot(d_v, start.mT) * decays.from_start
        d_k_end = chunks.dot(u_n, d_end.mT) * decays.to_end
        d_k += d_k_key + d_k_end
        d_start = decays.whole * d_end + chunks.dot(q_start.mT, d_n) - chunks.dot(k_start.mT, d_v)
        found = [d_q, d_k + d_k_query, d_v, d_beta]
        if log_decay_n is not None:
            terms = q_n * d_q + k_n * (d_k_query - d_k)
            by_end = (k_n * d_k_end).sum(-2) + (decays.whole * start * d_end).sum(-1)
            if per_head:
                terms, by_end = (x.sum(-1, keepdims=True) for x in (terms, by_end))
            found.append(chunks.dot(np.triu(chunks.ones(terms.dtype)), terms) + by_end[..., None, :])
        return d_start, [chunks.unslice(x) for x in found]

    d_start, found = jax.lax.scan(chunk, d_end, (jnp.arange(chunks.count), starts), reverse=not options.reverse)
    found = [*map(chunks.join, found), None][:5]
    found[0] *= options.scale
    for n in (1, 2):
        batch, length, groups, dim = operands[n].shape
        found[n] = found[n].reshape(batch, length, groups, -1, dim).sum(axis=3)
    return *(None if x is None else d_x.astype(x.dtype) for x, d_x in zip(operands, found)), d_start


def prepare(chunks: Chunks, q, k, v, beta, log_decay, dtype: jnp.dtype) -> tuple[jax.Array | None, ...]:
    """The tokens as `Chunks.prepare` gives them, with beta."""
    q, k, v, log_decay = chunks.prepare(q, k, v, log_decay, dtype)
    return q, k, v, chunks.pad(beta.astype(dtype)), log_decay


class System(NamedTuple):
    """The linear system of the corrections of a chunk.

    Attributes:
      matrix: M, `[batch, heads, tokens, tokens]`, zero on and above the diagonal.
      inverse: (I + diag(β) M)⁻¹.
      pull: cotangents of the keys, as those of token i and of token j of M_ij, from that of M.
    """

    matrix: jax.Array
    inverse: jax.Array
    pull: Any

    @classmethod
    def of(cls, chunks: Chunks, k: jax.Array, beta: jax.Array, decays: Decays) -> "System":
        levels = chunks.levels()
        matrix, pull = jax.vjp(lambda i, j: jnp.where(levels >= 0, chunks.weights(i, j, decays), 0), k, k)
        inverse = jnp.eye(chunks.size, dtype=k.dtype) - jnp.where(levels == 0, beta * matrix, 0)
        for level in range(1, chunks.size.bit_length() - 1):
            between = jnp.where(levels == level, beta * matrix, 0)
            inverse -= chunks.dot(chunks.dot(inverse, between), inverse)
        return cls(matrix, inverse, pull)
