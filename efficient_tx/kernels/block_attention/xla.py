"""Block attention in XLA: memory linear in the lengths, forward and backward; written for CPUs.

Every block of queries, of all heads and examples, is a row. Rows are independent, so a chunk of them at a time gathers
its blocks of keys and is one batched product: small blocks cost no more than large ones. A row meets all its keys at
once, which needs no running maximum; the backward pass recomputes the weights from the saved log-sum-exp.

A chunk of weights is never the transposed left factor of a product: XLA's CPU backend runs that at a quarter of the
speed. So the cotangents of keys and values are summed as `[dim, block]`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.block_attention.options import Options

# 1 MB of float32 weights a chunk: on two AVX-512 cores with 1 MB of L2 cache each, a quarter of it and four times it
# are slower at most block sizes.
CHUNK_AREA = 512 * 512


def unsupported(*, interpret: bool) -> str | None:
    """Why this implementation cannot do what is asked, or None."""
    return "interpret=True is for Pallas kernels, this one has nothing to interpret" if interpret else None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, blocks: jax.Array, bias: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output `[batch, padded queries, heads, v_dim]` and log-sum-exp `[batch, padded queries, heads]`.

    `q`, `k`, `v` have one dtype, float32 or float64, and lengths that are multiples of the block size; `real` is bool
    `[batch, padded keys]`, `blocks` int32 and `bias` `[batch, heads, query blocks, n]`.
    """
    grid = Grid.of(q, k, v, real, blocks, options)

    def chunk(row):
        logits, _ = grid.logits(row)
        # Finite, so that a query without keys has weights exp(−inf − peak) = 0.
        peak = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(logits.dtype).min / 2)
        weights = jnp.exp(logits - peak)
        total = weights.sum(-1, keepdims=True)
        found = total > 0
        total = jnp.where(found, total, 1)
        out = grid.dot("rqk,rkd->rqd", weights, grid.gather(grid.v, row)) / total
        return out, jnp.where(found, jnp.log(total) + peak, -jnp.inf)

    out, lse = jax.lax.map(chunk, grid.chunks(grid.rows(q, blocks, bias)))
    return grid.tokens(out), grid.tokens(lse)[..., 0]


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, blocks: jax.Array, bias: jax.Array | None,
    out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array, options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    """Cotangents of q, k, v and bias, from what `forward` took and gave and the cotangents of its results."""
    grid = Grid.of(q, k, v, real, blocks, options)
    delta = jnp.sum(out * d_out, axis=-1) - d_lse
    # A query without keys has logits −inf: any finite offset gives it weights of zero.
    of_tokens = (d_out, delta[..., None], jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    rows = grid.rows(q, blocks, bias), tuple(grid.cut(x, grid.query_blocks) for x in of_tokens)

    def chunk(carry, rows):
        d_k, d_v = carry
        row, (d_out, delta, lse) = rows
        logits, keys = grid.logits(row)
        weights = jnp.exp(logits - lse)
        d_logits = weights * (grid.dot("rqd,rkd->rqk", d_out, grid.gather(grid.v, row)) - delta)
        carry = (
            grid.scatter_add(d_k, row, grid.dot("rqd,rqk->rdk", row.q, d_logits)),
            grid.scatter_add(d_v, row, grid.dot("rqd,rqk->rdk", d_out, weights)),
        )
        d_bias = None if bias is None else d_logits.sum(1).reshape(*row.bias.shape, -1).sum(-1)
        return carry, (grid.dot("rqk,rkd->rqd", d_logits, keys), d_bias)

    carry = tuple(jnp.zeros_like(x.mT) for x in (grid.k, grid.v))
    carry, (d_q, d_bias) = jax.lax.scan(chunk, carry, grid.chunks(rows))
    # The barrier keeps XLA from folding the transposition into the slow product.
    d_k, d_v = (grid.paste(x.mT, k.shape[2]) for x in jax.lax.optimization_barrier(carry))
    d_bias = None if bias is None else d_bias.reshape(-1, d_bias.shape[-1])[: grid.count].reshape(bias.shape)
    return options.scale * grid.tokens(d_q), options.scale * d_k, d_v, d_bias


class Row(NamedTuple):
    """One block of queries of one head, or a chunk of them along a leading axis.

    Attributes:
      q: `[block, head_dim]`.
      block: its number among the blocks of its head.
      first: the first block of the head's keys, among those of all heads.
      listed: `[n]`, the head's blocks of keys that it meets, −1 for none.
      bias: `[n]` or None.
    """

    q: jax.Array
    block: jax.Array
    first: jax.Array
    listed: jax.Array
    bias: jax.Array | None


class Grid(NamedTuple):
    """Keys and values of all heads in one list of blocks, `[blocks, block, dim]`, and where the rows find theirs."""

    k: jax.Array
    v: jax.Array
    real: jax.Array
    batch: int
    heads: int
    groups: int
    query_blocks: int
    key_blocks: int
    listed: int
    options: Options

    @classmethod
    def of(
        cls, q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, blocks: jax.Array, options: Options
    ) -> "Grid":
        batch, keys, groups, _ = k.shape
        size = options.block_size
        real = jnp.broadcast_to(real[:, :, None, None], (batch, keys, groups, 1))
        k, v, real = (cls.cut(x, keys // size) for x in (k, v, real))
        return cls(
            k, v, real[..., 0], batch, q.shape[2], groups, q.shape[1] // size, keys // size, blocks.shape[-1], options
        )

    @staticmethod
    def cut(x: jax.Array, blocks: int) -> jax.Array:
        """`[batch, length, heads, dim]` as `[batch · heads · blocks, block, dim]`."""
        batch, length, heads, dim = x.shape
        return x.swapaxes(1, 2).reshape(batch * heads * blocks, length // blocks, dim)

    def paste(self, x: jax.Array, heads: int) -> jax.Array:
        """The inverse of `cut`."""
        return x.reshape(self.batch, heads, -1, x.shape[-1]).swapaxes(1, 2)

    @property
    def count(self) -> int:
        return self.batch * self.heads * self.query_blocks

    def rows(self, q: jax.Array, blocks: jax.Array, bias: jax.Array | None) -> Row:
        """All rows."""
        each = self.batch, self.heads, self.query_blocks
        group = jnp.arange(self.heads) * self.groups // self.heads
        head = jnp.arange(self.batch)[:, None] * self.groups + group
        return Row(
            q=self.cut(q, self.query_blocks),
            block=jnp.broadcast_to(jnp.arange(self.query_blocks), each).reshape(-1),
            first=jnp.broadcast_to(head[..., None] * self.key_blocks, each).reshape(-1),
            listed=blocks.reshape(-1, self.listed),
            bias=None if bias is None else bias.reshape(-1, self.listed),
        )

    def chunks(self, rows):
        """The arrays of `rows`, `[rows, ...]`, as `[chunks, rows of one, ...]`, filled up with rows that list block 0.

        Those have cotangents of zero and are dropped from the results. At least two in a chunk: XLA's CPU backend is
        three times slower at a leading axis of 1.
        """
        area = self.options.block_size**2 * self.listed
        count = -(-self.count // min(self.count, max(2, CHUNK_AREA // area)))
        size = -(-self.count // count)

        def split(x):
            x = jnp.pad(x, ((0, count * size - self.count), *((0, 0),) * (x.ndim - 1)))
            return x.reshape(count, size, *x.shape[1:])

        return jax.tree.map(split, rows)

    def tokens(self, x: jax.Array) -> jax.Array:
        """Results of the chunks, `[chunks, rows of one, block, dim]`, as `[batch, padded queries, heads, dim]`."""
        return self.paste(x.reshape(-1, *x.shape[2:])[: self.count], self.heads)

    def gather(self, x: jax.Array, row: Row) -> jax.Array:
        """The listed blocks of `x`, `[rows, n · block, ...]`; block 0 for none."""
        found = x[row.first[:, None] + jnp.maximum(row.listed, 0)]
        return found.reshape(found.shape[0], -1, *x.shape[2:])

    def scatter_add(self, x: jax.Array, row: Row, update: jax.Array) -> jax.Array:
        """`x` `[blocks, dim, block]` with `update` `[rows, dim, n · block]` added to the listed blocks."""
        update = update.reshape(*update.shape[:2], self.listed, -1).swapaxes(1, 2)
        return x.at[row.first[:, None] + jnp.maximum(row.listed, 0)].add(update)

    def dot(self, formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, y, precision=self.options.precision)

    def logits(self, row: Row) -> tuple[jax.Array, jax.Array]:
        """Logits `[rows, block, n · block]`, −inf where unseen, and the keys `[rows, n · block, head_dim]`."""
        size, keys = self.options.block_size, self.gather(self.k, row)
        real = self.gather(self.real, row) & jnp.repeat(row.listed >= 0, size, axis=1)
        bias = 0 if row.bias is None else jnp.repeat(row.bias, size, axis=1)
        logits = self.dot("rqd,rkd->rqk", self.options.scale * row.q, keys)
        logits += jnp.where(real, bias, -jnp.inf)[:, None].astype(logits.dtype)
        inside = jnp.arange(size)
        query = row.block[:, None] * size + inside
        key = (row.listed[..., None] * size + inside).reshape(keys.shape[:2])
        seen = self.options.seen(query[:, :, None], key[:, None])
        return (logits if seen is None else jnp.where(seen, logits, -jnp.inf)), keys
