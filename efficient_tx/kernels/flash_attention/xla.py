"""Blockwise attention in XLA: memory linear in the lengths, forward and backward; written for CPUs.

One head of one example at a time, a block of queries against a block of keys, with the running maximum and sum of
online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867); the backward pass recomputes the weights of a block
from the saved log-sum-exp (Dao et al. 2022, arXiv 2205.14135).

No product has a block of weights as its transposed left factor: XLA's CPU backend runs that one at a quarter of the
speed of the others. So the arrays of a head are `[dim, length]`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention.options import Options

# The fastest of the sizes from 128 to 2048 tried on two AVX-512 cores with 1 MB of L2 each, head_dim 32, among those
# that still skip most of what the mask or causality rules out.
LARGEST_BLOCK = 512


def unsupported(*, interpret: bool, mask_of_pairs: bool) -> str | None:
    """Why this implementation cannot do what is asked, or None."""
    if mask_of_pairs:
        return "it takes key masks [batch, keys] only, since one of all pairs is quadratic in the length"
    return "interpret=True is for Pallas kernels, this one has nothing to interpret" if interpret else None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """Output `[batch, queries, heads, v_dim]` and, for softmax, the log-sum-exp `[batch, queries, heads]` (else None).

    `q` is `[batch, queries, heads, head_dim]`, `k` and `v` have as many heads, all have one dtype, float32 or float64;
    `mask` is bool `[batch, keys]` or None.
    """
    grid = Grid.of(q, k, options)

    def head(arrays):
        q, offset, k, v, column, key_blocks = arrays

        def block_of_queries(i):
            q_i, offset_i = grid.query_slice(q, i), grid.query_slice(offset, i).T

            def softmax(j, carry):
                out, total, peak = carry
                logits = grid.logits(q_i, k, column, i, j)
                new_peak = jnp.maximum(peak, logits.max(-1, keepdims=True))
                weights, fade = jnp.exp(logits - new_peak), jnp.exp(peak - new_peak)
                out = out * fade + grid.dot(weights, grid.key_slice(v, j).T)
                return out, total * fade + weights.sum(-1, keepdims=True), new_peak

            def unnormalised(j, out):
                weights = grid.weights(grid.logits(q_i, k, column, i, j), offset_i)
                return out + grid.dot(weights, grid.key_slice(v, j).T)

            count = grid.visible(i, key_blocks)
            out = jnp.zeros((grid.query_block, v.shape[0]), v.dtype)
            if options.score != "softmax":
                return jax.lax.fori_loop(0, count, unnormalised, out), None
            total = jnp.zeros((grid.query_block, 1), v.dtype)
            # Finite, so that a block without keys adds exp(−inf − peak) = 0 and not exp(−inf + inf).
            peak = jnp.full_like(total, jnp.finfo(v.dtype).min / 2)
            out, total, peak = jax.lax.fori_loop(0, count, softmax, (out, total, peak))
            seen = total > 0
            total = jnp.where(seen, total, 1)
            return out / total, jnp.where(seen, jnp.log(total) + peak, -jnp.inf)

        return jax.lax.map(block_of_queries, jnp.arange(grid.query_blocks))

    by_query = (grid.split_queries(options.scale * q), grid.split_queries(offsets(q, None, options)))
    out, lse = jax.lax.map(head, (*by_query, grid.split_keys(k), grid.split_keys(v), *grid.columns(k, mask)))
    return grid.merge(out, grid.queries), None if lse is None else grid.merge(lse, grid.queries)[..., 0]


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, out: jax.Array, lse: jax.Array | None,
    d_out: jax.Array, d_lse: jax.Array | None, options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Cotangents of q, k and v, from what `forward` took and gave and the cotangents of its results."""
    grid = Grid.of(q, k, options)

    def head(arrays):
        q, d_out, offset, delta, k, v, column, key_blocks = arrays

        def block_of_queries(carry, i):
            q_i, d_i, offset_i, delta_i = (grid.query_slice(x, i) for x in (q, d_out, offset, delta))

            def block(j, carry):
                d_q, d_k, d_v = carry
                k_j, v_j = grid.key_slice(k, j), grid.key_slice(v, j)
                weights = grid.weights(grid.logits(q_i, k, column, i, j), offset_i.T)
                d_logits = weights * (grid.dot(d_i.T, v_j) - delta_i.T)
                if options.score == "sigmoid":
                    d_logits *= 1 - weights
                return (
                    d_q + grid.dot(d_logits, k_j.T),
                    grid.add_keys(d_k, j, grid.dot(q_i, d_logits)),
                    grid.add_keys(d_v, j, grid.dot(d_i, weights)),
                )

            d_q = jnp.zeros((grid.query_block, q.shape[0]), q.dtype)
            d_q, *carry = jax.lax.fori_loop(0, grid.visible(i, key_blocks), block, (d_q, *carry))
            return tuple(carry), d_q

        (d_k, d_v), d_q = jax.lax.scan(
            block_of_queries, (jnp.zeros_like(k), jnp.zeros_like(v)), jnp.arange(grid.query_blocks)
        )
        return d_q, d_k.T, d_v.T

    row_sums = jnp.sum(d_out * out, axis=-1, keepdims=True)
    delta = row_sums - d_lse[..., None] if options.score == "softmax" else jnp.zeros_like(row_sums)
    by_query = (grid.split_queries(x) for x in (options.scale * q, d_out, offsets(q, lse, options), delta))
    d_q, d_k, d_v = jax.lax.map(head, (*by_query, grid.split_keys(k), grid.split_keys(v), *grid.columns(k, mask)))
    d_q = options.scale * grid.merge(d_q, grid.queries)
    d_k, d_v = grid.merge(d_k, grid.keys), grid.merge(d_v, grid.keys)
    if options.score == "gaussian":
        # The norms' part: the derivatives of the logits sum to out·d_out over the keys, v·d_v over the queries.
        d_q -= options.scale * q * row_sums
        d_k -= options.scale * k * jnp.sum(v * d_v, axis=-1, keepdims=True)
    return d_q, d_k, d_v


def offsets(q: jax.Array, lse: jax.Array | None, options: Options) -> jax.Array:
    """What is subtracted from the logits of each query before `exp`, `[batch, queries, heads, 1]`."""
    if options.score == "gaussian":
        return options.scale / 2 * jnp.sum(q * q, axis=-1, keepdims=True)
    # A query without keys has lse −inf and logits −inf: any finite offset gives it weights of zero.
    return jnp.zeros_like(q[..., :1]) if lse is None else jnp.where(jnp.isfinite(lse), lse, 0)[..., None]


class Grid(NamedTuple):
    """Queries and keys of every head cut into equal blocks; causality aligns the last query with the last key."""

    batch: int
    queries: int
    keys: int
    query_block: int
    key_block: int
    options: Options

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, options: Options) -> "Grid":
        def block(length):
            count = -(-length // LARGEST_BLOCK)
            return 16 * -(-length // (16 * count))

        batch, queries, _, _ = q.shape
        return cls(batch, queries, k.shape[1], block(queries), block(k.shape[1]), options)

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // self.query_block)

    @property
    def padded_keys(self) -> int:
        return -(-self.keys // self.key_block) * self.key_block

    def split_queries(self, x: jax.Array) -> jax.Array:
        """`[batch, queries, heads, dim]` -> `[batch · heads, dim, whole blocks of queries]`, filled with zeros."""
        return split(x, self.query_blocks * self.query_block)

    def split_keys(self, x: jax.Array) -> jax.Array:
        """`[batch, keys, heads, dim]` -> `[batch · heads, dim, whole blocks of keys]`, filled with zeros."""
        return split(x, self.padded_keys)

    def merge(self, x: jax.Array, length: int) -> jax.Array:
        """`[batch · heads, length or blocks, ..., dim]` -> `[batch, length, heads, dim]`, without the filling."""
        x = x.reshape(self.batch, x.shape[0] // self.batch, -1, x.shape[-1])
        return x[:, :, :length].swapaxes(1, 2)

    def columns(self, k: jax.Array, mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """What each key adds to its logits, `[batch · heads, 1, padded keys]`, and how many key blocks are needed."""
        batch, keys, heads, _ = k.shape
        real = jnp.ones((batch, keys), bool) if mask is None else mask
        real = jnp.pad(real, ((0, 0), (0, self.padded_keys - keys)))
        column = jnp.full((batch, keys, heads, 1), self.options.bias, k.dtype)
        column -= offsets(k, None, self.options)
        column = jnp.where(jnp.repeat(real, heads, axis=0)[:, None], self.split_keys(column), -jnp.inf)
        needed = jnp.max(jnp.where(real, jnp.arange(self.padded_keys) // self.key_block + 1, 0), axis=1)
        return column, jnp.repeat(needed, heads)

    def query_slice(self, x: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * self.query_block, self.query_block, axis=1)

    def key_slice(self, x: jax.Array, j: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, j * self.key_block, self.key_block, axis=1)

    def add_keys(self, x: jax.Array, j: jax.Array, update: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, self.key_slice(x, j) + update, j * self.key_block, axis=1)

    def visible(self, i: jax.Array, key_blocks: jax.Array) -> jax.Array:
        """How many of the first `key_blocks` blocks of keys the query block `i` needs."""
        if not self.options.causal:
            return key_blocks
        last_key = (i + 1) * self.query_block - 1 + self.keys - self.queries
        return jnp.clip(last_key // self.key_block + 1, 0, key_blocks)

    def dot(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, precision=self.options.precision)

    def logits(self, q_i: jax.Array, k: jax.Array, column: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Of query block `i`, `[dim, query_block]`, with key block `j`: `[query_block, key_block]`, −inf if unseen."""
        logits = self.dot(q_i.T, self.key_slice(k, j)) + self.key_slice(column, j)
        if not self.options.causal:
            return logits
        query = i * self.query_block + jnp.arange(self.query_block)[:, None] + self.keys - self.queries
        return jnp.where(j * self.key_block + jnp.arange(self.key_block) <= query, logits, -jnp.inf)

    def weights(self, logits: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(logits) if self.options.score == "sigmoid" else jnp.exp(logits - offset)


def split(x: jax.Array, length: int) -> jax.Array:
    """`[batch, tokens, heads, dim]` -> `[batch · heads, dim, length]`, filled with zeros."""
    batch, tokens, heads, dim = x.shape
    x = x.transpose(0, 2, 3, 1).reshape(batch * heads, dim, tokens)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - tokens)))
