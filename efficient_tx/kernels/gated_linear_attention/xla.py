"""Chunked gated linear attention in XLA: memory linear in the length, forward and backward; written for CPUs.

A scan over chunks of tokens carries the state. With D_ij = Σ_{j<t≤i} log_decay_t ≤ 0, a chunk computes

    out_i = (q_i ⊙ exp(D_i,start)) S_start + Σ_{j≤i} (Σ_c q_ic k_jc exp(D_ijc)) v_j,
    S_end = exp(D_end,start) S_start + Σ_j (k_j ⊙ exp(D_end,j))ᵀ v_j.

The factorisation exp(D_ij) = exp(D_i,start) exp(−D_j,start) would overflow. For this reason Yang et al. 2024
(arXiv 2312.06635) split chunks once more; here a chunk is halved recursively down to single tokens. The middle m of
exactly one block of this tree separates the tokens j < i. There exp(D_ij) = exp(D_im) exp(D_mj) has no positive
exponent, and each level of the tree is one masked product. Sums of decays are computed directly: a difference of two
cumulative sums loses its digits after a strong decay.

The backward pass recomputes everything, also the states at the starts of the chunks. The cotangent of the decays
follows from those of queries and keys, because q_i always occurs with the factor exp(D_i·) and k_j with exp(D_·j). With
S̄ the cotangent of S_end,

    d log_decay_t = Σ_{i≥t} (q_i ⊙ q̄_i − k_i ⊙ k̄_i) + Σ_values S̄ ⊙ S_end.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.kernels.decay import finite
from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.shapes import nothing

# Tokens per chunk, with a decay per head and per channel: the fastest powers of two on two AVX-512 cores.
CHUNK, CHANNEL_CHUNK = 64, 32


def unsupported(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, *_: Any) -> str | None:
    """The reason why it does not support the arguments, or None."""
    return nothing(q, v)


def sizes(options: Options, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, *_: Any) -> int:
    """Tokens per chunk, a power of two."""
    largest = CHUNK if log_decay is None or log_decay.shape[-1] == 1 else CHANNEL_CHUNK
    return min(largest, max(2, 1 << (q.shape[1] - 1).bit_length()))


def forward(
    options: Options, size: int, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[()]]:
    """Output and the state after the last step, of the arrays that `reference.forward` describes; nothing is saved."""
    chunks = Chunks(*q.shape[:2], size, options)
    tokens = chunks.prepare(q, k, v, log_decay, dtype=state.dtype)

    def chunk(start, n):
        q_n, k_n, v_n, log_decay_n = (chunks.slice(x, n) for x in tokens)
        decays = chunks.decays(log_decay_n)
        out = chunks.dot(chunks.weights(q_n, k_n, decays), v_n) + chunks.dot(q_n * decays.from_start, start)
        end = decays.whole * start + chunks.dot((k_n * decays.to_end).mT, v_n)
        return end, chunks.unslice(out)

    end, out = jax.lax.scan(chunk, chunks.rows(state), jnp.arange(chunks.count), reverse=options.reverse)
    return (chunks.join(out).astype(q.dtype), end.reshape(state.shape)), ()


def backward(
    options: Options, size: int, arrays: tuple, outputs: Any, saved: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
    """Cotangents of q, k, v, log_decay and the initial state, from those of the output and the final state."""
    *operands, state = arrays
    d_out, d_end = cotangents
    chunks = Chunks(*operands[0].shape[:2], size, options)
    per_head = operands[3] is not None and operands[3].shape[-1] == 1
    tokens = chunks.prepare(*operands, dtype=state.dtype)
    d_out = chunks.pad(d_out.astype(state.dtype))

    def pass_over(start, n):
        k_n, v_n, log_decay_n = (chunks.slice(x, n) for x in tokens[1:])
        to_end, whole = chunks.decays_to_end(log_decay_n)
        return whole * start + chunks.dot((k_n * to_end).mT, v_n), start

    _, starts = jax.lax.scan(pass_over, chunks.rows(state), jnp.arange(chunks.count), reverse=options.reverse)

    def chunk(d_end, n_and_start):
        n, start = n_and_start
        q_n, k_n, v_n, log_decay_n, d_n = (chunks.slice(x, n) for x in (*tokens, d_out))
        decays = chunks.decays(log_decay_n)
        weights, pull = jax.vjp(lambda q, k: chunks.weights(q, k, decays), q_n, k_n)
        d_q, d_k = pull(chunks.dot(d_n, v_n.mT))
        d_q += chunks.dot(d_n, start.mT) * decays.from_start
        d_k_end = chunks.dot(v_n, d_end.mT) * decays.to_end
        d_k += d_k_end
        d_v = chunks.dot(weights.mT, d_n) + chunks.dot(k_n * decays.to_end, d_end)
        d_start = decays.whole * d_end + chunks.dot((q_n * decays.from_start).mT, d_n)
        found = [d_q, d_k, d_v]
        if log_decay_n is not None:
            by_end = (k_n * d_k_end).sum(-2) + (decays.whole * start * d_end).sum(-1)
            found.append(chunks.d_log_decay(q_n * d_q - k_n * d_k, by_end, per_head))
        return d_start, [chunks.unslice(x) for x in found]

    numbered = jnp.arange(chunks.count), starts
    d_start, found = jax.lax.scan(chunk, chunks.rows(d_end), numbered, reverse=not options.reverse)
    found = dict(zip(("q", "k", "v", "log_decay"), map(chunks.join, found)))
    found["q"] *= options.scale
    for name, x in zip("kv", operands[1:3]):
        batch, length, groups, dim = x.shape
        found[name] = found[name].reshape(batch, length, groups, -1, dim).sum(axis=3)
    d_tokens = (
        None if x is None else found[name].astype(x.dtype) for name, x in zip(("q", "k", "v", "log_decay"), operands)
    )
    return *d_tokens, d_start.reshape(state.shape)


class Decays(NamedTuple):
    """The decay factors of tokens and states within a chunk; head_dim is 1 if the decay is per head.

    Attributes:
      from_start: `[rows, tokens, head_dim]`, decay over the tokens up to and including this one.
      to_end: the same shape, decay over the tokens after this one.
      whole: `[rows, head_dim, 1]`, decay over the whole chunk.
      between: with a decay per head `[rows, tokens, tokens]`, from token to token; with a decay per channel
        `[rows, levels, tokens, head_dim]`, between a token and the middle of its block of that level. Without
        decay it is None, and the others are 1.
    """

    from_start: jax.Array | float = 1.0
    to_end: jax.Array | float = 1.0
    whole: jax.Array | float = 1.0
    between: jax.Array | None = None


class Chunks(NamedTuple):
    """The sequence split into chunks of `size`, a power of two; padding after the end counts as identity steps.

    Within a chunk batch and heads are one axis, rows: with a leading axis of 1, jax 0.10 on CPUs computes sums of
    products 20 to 40 times slower.
    """

    batch: int
    length: int
    size: int
    options: Options

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def prepare(self, q, k, v, log_decay, dtype):
        """The tokens in `dtype`, `[batch, padded length, heads, dim]`, q scaled, k and v repeated for their heads."""
        heads = q.shape[2]
        q, k, v, log_decay = (None if x is None else x.astype(dtype) for x in (q, k, v, log_decay))
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))
        return tuple(None if x is None else self.pad(x) for x in (q * self.options.scale, k, v, log_decay))

    def pad(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, self.count * self.size - self.length), (0, 0), (0, 0)))

    def slice(self, x: jax.Array | None, n: jax.Array) -> jax.Array | None:
        """Chunk `n` of `[batch, padded length, heads, dim]`: `[rows, tokens, dim]`, in order of the steps."""
        if x is None:
            return None
        x = jax.lax.dynamic_slice_in_dim(x, n * self.size, self.size, axis=1)
        return self.rows((jnp.flip(x, axis=1) if self.options.reverse else x).swapaxes(1, 2))

    def rows(self, x: jax.Array) -> jax.Array:
        """`[batch, heads, ...]` as `[rows, ...]`."""
        return x.reshape(-1, *x.shape[2:])

    def unslice(self, x: jax.Array) -> jax.Array:
        """A chunk `[rows, tokens, dim]` as `[batch, tokens, heads, dim]`, in the order of the tokens."""
        x = x.reshape(self.batch, -1, *x.shape[1:]).swapaxes(1, 2)
        return jnp.flip(x, axis=1) if self.options.reverse else x

    def join(self, x: jax.Array) -> jax.Array:
        """Concatenates chunks `[count, batch, tokens, heads, dim]` to `[batch, length, heads, dim]`."""
        x = x.swapaxes(0, 1)
        return x.reshape(x.shape[0], self.count * self.size, *x.shape[3:])[:, : self.length]

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, precision=self.options.precision)

    def ones(self, dtype: jnp.dtype) -> np.ndarray:
        return np.ones((self.size, self.size), dtype)

    def d_log_decay(self, terms: jax.Array, by_end: jax.Array, per_head: bool) -> jax.Array:
        """The cotangent of a chunk's decays, from that by every token, and that by the state at the end."""
        if per_head:
            terms, by_end = (x.sum(-1, keepdims=True) for x in (terms, by_end))
        return self.dot(np.triu(self.ones(terms.dtype)), terms) + by_end[..., None, :]

    def levels(self) -> np.ndarray:
        """The level that separates query i (row) and key j: half blocks of 2^level tokens; −1: j = i, −2: j > i."""
        i = np.arange(self.size)
        _, bits = np.frexp(i[:, None] ^ i)
        return np.where(i[:, None] >= i, bits - 1, -2)

    def spans(self, dtype: jnp.dtype) -> np.ndarray:
        """The tokens whose decays are summed for each token (row).

        These are the tokens up to it, those after it, and for each level those between it and the middle of its block.
        The middle is the first token of the second half and is included.
        """
        i = np.arange(self.size)
        row, spans = i[:, None], [i <= i[:, None], i > i[:, None]]
        for level in range(self.size.bit_length() - 1):
            middle = (row >> level | 1) << level
            spans.append(np.where(row >= middle, (middle <= i) & (i <= row), (row < i) & (i < middle)))
        return np.concatenate(spans).astype(dtype)

    def decays(self, log_decay: jax.Array | None) -> Decays:
        """The decay factors of one chunk, from `log_decay` `[rows, tokens, head_dim or 1]`."""
        if log_decay is None:
            return Decays()
        log_decay = finite(log_decay, self.size)
        spans = self.spans(log_decay.dtype)
        if log_decay.shape[-1] == 1:
            spans = spans[: 2 * self.size]
            pairs = self.dot(np.tril(self.ones(log_decay.dtype)), jnp.where(self.levels() >= 0, log_decay, 0))
        sums = self.dot(spans, log_decay)
        sums = jnp.exp(sums.reshape(len(sums), -1, *log_decay.shape[-2:]))
        between = jnp.exp(pairs) if log_decay.shape[-1] == 1 else sums[:, 2:]
        return Decays(sums[:, 0], sums[:, 1], sums[:, 0, -1, :, None], between)

    def decays_to_end(self, log_decay: jax.Array | None) -> tuple[jax.Array | float, jax.Array | float]:
        """`to_end` and `whole` of the decay factors of one chunk."""
        if log_decay is None:
            return 1.0, 1.0
        log_decay = finite(log_decay, self.size)
        to_end = self.dot(np.triu(self.ones(log_decay.dtype), 1), log_decay)
        return jnp.exp(to_end), jnp.exp(log_decay.sum(-2))[..., None]

    def weights(self, q: jax.Array, k: jax.Array, decays: Decays) -> jax.Array:
        """Σ_c q_ic k_jc exp(D_ijc), `[rows, tokens, tokens]`; zero for j > i."""
        levels, between = self.levels(), decays.between
        if between is None:
            return jnp.where(levels > -2, self.dot(q, k.mT), 0)
        if between.ndim == 3:
            return jnp.where(levels > -2, self.dot(q, k.mT) * between, 0)
        products = self.dot(q[:, None] * between, (k[:, None] * between).mT)
        weights = jnp.where(levels == -1, (q * k).sum(-1, keepdims=True), 0)
        for level in range(products.shape[1]):
            weights += jnp.where(levels == level, products[:, level], 0)
        return weights
