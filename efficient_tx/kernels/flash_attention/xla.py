"""Blockwise attention in XLA: memory linear in the lengths, forward and backward; written for CPUs.

It processes one head of one example at a time, a block of queries with a block of keys, with the running maximum and
sum of online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867). The backward pass recomputes the weights of a
block from the saved log-sum-exp (Dao et al. 2022, arXiv 2205.14135).

A block of weights is never the transposed left factor of a product, because XLA's CPU backend runs that at a quarter of
the speed. So the cotangents of keys and values are summed as `[dim, keys]`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention.options import Options

# 1 MB of float32 weights: the fastest size on two AVX-512 cores with 1 MB of L2 cache each, among the sizes tried that
# still skip most of the masked or future keys.
BLOCK_AREA = 512 * 512


def unsupported(*, interpret: bool, mask_of_pairs: bool) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    if mask_of_pairs:
        return "it takes key masks [batch, keys] only, since one of all pairs is quadratic in the length"
    return "interpret=True is for Pallas kernels, this one has nothing to interpret" if interpret else None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """Output `[batch, queries, heads, v_dim]` and, for softmax, the log-sum-exp `[batch, queries, heads]` (else None).

    `q` is `[batch, queries, heads, head_dim]`, `k` and `v` have the same number of heads; all have one dtype, float32
    or float64; `mask` is bool `[batch, keys]` or None.
    """
    grid = Grid.of(q, k, options)
    q, k, v, real = grid.pad_queries(q), grid.pad_keys(k), grid.pad_keys(v), grid.real_keys(k, mask)

    def head(n, results):
        q_n, k_n, v_n = (head_of(x, n) for x in (q, k, v))
        column, key_blocks = grid.columns(k_n, real, n)

        def block_of_queries(i):
            q_i = grid.query_slice(q_n, i)
            offset = grid.half_norms(q_i)

            def softmax(j, carry):
                out, total, peak = carry
                logits = grid.logits(q_i, k_n, column, i, j)
                new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
                weights, fade = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
                out = out * fade + grid.dot(weights, grid.key_slice(v_n, j))
                return out, total * fade + weights.sum(-1, keepdims=True), new_peak

            def unnormalised(j, out):
                weights = grid.weights(grid.logits(q_i, k_n, column, i, j), offset)
                return out + grid.dot(weights, grid.key_slice(v_n, j))

            out = jnp.zeros((grid.query_block, v_n.shape[1]), v_n.dtype)
            if options.score != "softmax":
                return (grid.for_keys(i, key_blocks, unnormalised, out),)
            total = jnp.zeros((grid.query_block, 1), v_n.dtype)
            # Finite, so that a block without keys adds exp(−inf − peak) = 0, not exp(−inf + inf).
            peak = jnp.full_like(total, jnp.finfo(v_n.dtype).min / 2)
            out, total, peak = grid.for_keys(i, key_blocks, softmax, (out, total, peak))
            seen = total > 0
            total = jnp.where(seen, total, 1)
            return out / total, jnp.where(seen, jnp.log(total) + peak, -jnp.inf)

        found = jax.lax.map(block_of_queries, jnp.arange(grid.query_blocks))
        return tuple(with_head(x, n, y.reshape(-1, y.shape[-1])) for x, y in zip(results, found))

    results = (jnp.zeros_like(q, shape=(*q.shape[:3], v.shape[3])),)
    if options.score == "softmax":
        results += (jnp.zeros_like(q, shape=(*q.shape[:3], 1)),)
    out, *lse = jax.lax.fori_loop(0, q.shape[0] * q.shape[2], head, results)
    return out[:, : grid.queries], lse[0][:, : grid.queries, :, 0] if lse else None


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, out: jax.Array, lse: jax.Array | None,
    d_out: jax.Array, d_lse: jax.Array | None, options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Cotangents of q, k and v, from the inputs and outputs of `forward` and the cotangents of the outputs."""
    grid = Grid.of(q, k, options)
    keys = k.shape[1]
    real = grid.real_keys(k, mask)
    # Softmax only. A query without keys has lse −inf and logits −inf, so any finite offset gives zero weights.
    lse = None if lse is None else grid.pad_queries(jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    d_lse = None if d_lse is None else grid.pad_queries(d_lse[..., None])
    q, out, d_out, k, v = *(grid.pad_queries(x) for x in (q, out, d_out)), grid.pad_keys(k), grid.pad_keys(v)

    def head(n, results):
        q_n, out_n, d_n, k_n, v_n = (head_of(x, n) for x in (q, out, d_out, k, v))
        column, key_blocks = grid.columns(k_n, real, n)
        row_sums = jnp.sum(out_n * d_n, axis=-1, keepdims=True)
        offset_n = grid.half_norms(q_n) if lse is None else head_of(lse, n)
        delta = row_sums - head_of(d_lse, n) if options.score == "softmax" else None

        def block_of_queries(carry, i):
            q_i, d_i, offset = (grid.query_slice(x, i) for x in (q_n, d_n, offset_n))

            def block(j, carry):
                d_q, d_k, d_v = carry
                weights = grid.weights(grid.logits(q_i, k_n, column, i, j), offset)
                d_logits = grid.dot(d_i, grid.key_slice(v_n, j).T)
                if options.score == "softmax":
                    d_logits -= grid.query_slice(delta, i)
                d_logits *= weights * (1 - weights) if options.score == "sigmoid" else weights
                return (
                    d_q + grid.dot(d_logits, grid.key_slice(k_n, j)),
                    grid.add_keys(d_k, j, grid.dot(q_i.T, d_logits)),
                    grid.add_keys(d_v, j, grid.dot(d_i.T, weights)),
                )

            d_q, *carry = grid.for_keys(i, key_blocks, block, (jnp.zeros_like(q_i), *carry))
            return tuple(carry), d_q

        carry = (jnp.zeros_like(k_n.T), jnp.zeros_like(v_n.T))
        carry, d_q = jax.lax.scan(block_of_queries, carry, jnp.arange(grid.query_blocks))
        # The barrier keeps XLA from folding the transposition into the slow product.
        d_q, (d_k, d_v) = d_q.reshape(q_n.shape), (x.T for x in jax.lax.optimization_barrier(carry))
        if options.score == "gaussian":
            # The contribution of the norms: d_logits sums to out·d_out over the keys and to v·d_v over the queries.
            d_q -= q_n * row_sums
            d_k -= k_n * jnp.sum(v_n * d_v, axis=-1, keepdims=True)
        return tuple(with_head(x, n, y) for x, y in zip(results, (options.scale * d_q, options.scale * d_k, d_v)))

    d_q, d_k, d_v = jax.lax.fori_loop(0, q.shape[0] * q.shape[2], head, tuple(jnp.zeros_like(x) for x in (q, k, v)))
    return d_q[:, : grid.queries], d_k[:, :keys], d_v[:, :keys]


def head_of(x: jax.Array, n: jax.Array) -> jax.Array:
    """Head `n` of `[batch, length, heads, dim]`, counted over batch and heads: `[length, dim]`."""
    _, length, heads, dim = x.shape
    return jax.lax.dynamic_slice(x, (n // heads, 0, n % heads, 0), (1, length, 1, dim)).reshape(length, dim)


def with_head(x: jax.Array, n: jax.Array, value: jax.Array) -> jax.Array:
    """`x` with its head `n` replaced."""
    _, length, heads, dim = x.shape
    return jax.lax.dynamic_update_slice(x, value.reshape(1, length, 1, dim), (n // heads, 0, n % heads, 0))


class Grid(NamedTuple):
    """Queries and keys of a head split into equal blocks; causal masks align the last query with the last key."""

    queries: int
    keys: int
    query_block: int
    key_block: int
    options: Options

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, options: Options) -> "Grid":
        def block(length, largest):
            count = -(-length // largest)
            return 16 * -(-length // (16 * count))

        queries, keys = q.shape[1], k.shape[1]
        side = round(BLOCK_AREA**0.5)
        # Square blocks; if one side is short, the other is longer.
        key_block = block(keys, max(side, BLOCK_AREA // block(queries, side)))
        return cls(queries, keys, block(queries, max(side, BLOCK_AREA // key_block)), key_block, options)

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.query_block)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.key_block)

    def pad_queries(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, self.query_blocks * self.query_block - x.shape[1]), (0, 0), (0, 0)))

    def pad_keys(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, self.key_blocks * self.key_block - x.shape[1]), (0, 0), (0, 0)))

    def real_keys(self, k: jax.Array, mask: jax.Array | None) -> jax.Array | None:
        """The mask `[batch, padded keys, heads, 1]`; None if all keys are real."""
        if mask is None and self.key_blocks * self.key_block == self.keys:
            return None
        mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
        return self.pad_keys(jnp.broadcast_to(mask[:, :, None, None], (*k.shape[:3], 1)))

    def columns(self, k_n, real, n):
        """The term of each key of head `n` in the logits, `[1, padded keys]`, and the number of key blocks needed."""
        column = (self.options.bias - self.half_norms(k_n)).T
        if real is None:
            return column, self.key_blocks
        real = head_of(real, n).T
        needed = jnp.max(jnp.where(real, jnp.arange(real.shape[1]) // self.key_block + 1, 0))
        return jnp.where(real, column, -jnp.inf), needed

    def half_norms(self, x):
        """scale · ‖x‖² / 2 for the Gaussian, zeros for other scores, `[length, 1]`."""
        norms = jnp.sum(x * x, axis=-1, keepdims=True) if self.options.score == "gaussian" else jnp.zeros_like(x[:, :1])
        return self.options.scale / 2 * norms

    def query_slice(self, x: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.query_block, self.query_block)

    def key_slice(self, x: jax.Array, j: jax.Array, axis: int = 0) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.key_block, self.key_block, axis)

    def add_keys(self, x: jax.Array, j: jax.Array, update: jax.Array) -> jax.Array:
        """`x` `[dim, padded keys]` with `update` added to its block `j`."""
        return jax.lax.dynamic_update_slice_in_dim(x, self.key_slice(x, j, 1) + update, j * self.key_block, 1)

    def for_keys(self, i: jax.Array, key_blocks, body, carry):
        """Runs `body(j, carry)` over the key blocks that query block `i` needs, among the first `key_blocks`."""
        if self.key_blocks == 1:
            return body(0, carry)
        if self.options.causal:
            last_key = (i + 1) * self.query_block - 1 + self.keys - self.queries
            key_blocks = jnp.clip(last_key // self.key_block + 1, 0, key_blocks)
        return jax.lax.fori_loop(0, key_blocks, body, carry)

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, precision=self.options.precision)

    def logits(self, q_i: jax.Array, k: jax.Array, column: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Logits of query block `i` and key block `j`, `[query_block, key_block]`; −inf for keys that are not seen."""
        logits = self.dot(self.options.scale * q_i, self.key_slice(k, j).T) + self.key_slice(column, j, 1)
        if not self.options.causal:
            return logits
        query = i * self.query_block + jnp.arange(self.query_block)[:, None] + self.keys - self.queries
        return jnp.where(j * self.key_block + jnp.arange(self.key_block) <= query, logits, -jnp.inf)

    def weights(self, logits: jax.Array, offset: jax.Array) -> jax.Array:
        if self.options.score == "sigmoid":
            return jax.nn.sigmoid(logits)
        if self.options.score == "gaussian":
            # Rounding may make a squared distance negative.
            return jnp.exp(jnp.minimum(logits - offset, self.options.bias))
        return jnp.exp(logits - offset)
