"""Block attention in XLA: memory linear in the lengths, forward and backward.

A row is one block of queries with all its heads. Rows are independent: a chunk of rows, of any examples, gathers its
key blocks and computes one batched product. So small blocks cost no more than large ones, and no whole array is
transposed. A row processes all its keys at once and needs no running maximum. The backward pass recomputes the weights
from the saved log-sum-exp. On a CPU the weights of a chunk fit in the cache; elsewhere few chunks are large.

A chunk of weights is never the transposed left factor of a product, because XLA's CPU backend runs that at a quarter of
the speed. So the cotangents of keys and values are summed as `[dim, block]`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.block_attention.options import Options
from efficient_tx.kernels.platform import by_platform

# 1 MB of float32 weights per chunk. On two AVX-512 cores with 1 MB of L2 cache each, a quarter and four times of it are
# slower at most block sizes.
CHUNK_AREA = 512 * 512
# 64 MB of float32 weights per chunk: enough for all units of a GPU or TPU.
ACCELERATOR_AREA = 1 << 24


def unsupported(options: Options, *operands: jax.Array) -> None:
    """It supports everything."""


def sizes(options: Options, *operands: jax.Array) -> "Areas":
    return Areas(CHUNK_AREA, ACCELERATOR_AREA)


class Areas(NamedTuple):
    """Weights per chunk of rows, on CPUs and elsewhere."""

    cpu: int
    default: int


def forward(options: Options, areas: Areas, *operands: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
    """Output and log-sum-exp; operands as in `Options`."""
    chunked = {name: partial(chunked_forward, options, area) for name, area in areas._asdict().items()}
    return by_platform(chunked, *operands), None


def chunked_forward(options: Options, area: int, q, k, v, mask, blocks, bias) -> tuple[jax.Array, jax.Array]:
    grid = Grid.of(options, area, q, k, v, mask, blocks, bias)

    def chunk(row):
        logits, _ = grid.logits(row)
        # Finite, so that a query without keys has weights exp(−inf − peak) = 0.
        peak = jnp.maximum(logits.max(-1, keepdims=True), jnp.finfo(logits.dtype).min / 2)
        weights = jnp.exp(logits - peak)
        total = weights.sum(-1, keepdims=True)
        found = total > 0
        total = jnp.where(found, total, 1)
        out = grid.dot("rqk,rkd->rqd", weights, grid.gather(grid.v, row)) / total
        return grid.tokens(out).astype(q.dtype), grid.tokens(jnp.where(found, jnp.log(total) + peak, -jnp.inf))

    out, lse = jax.lax.map(chunk, grid.chunks(grid.rows(q, blocks, bias)))
    return grid.paste(out), grid.paste(lse)[..., 0]


def backward(options: Options, areas: Areas, operands: tuple, outputs: tuple, saved: None, cotangents: tuple) -> tuple:
    """Cotangents of q, k, v and the bias, and None for the mask and the blocks."""
    chunked = {name: partial(chunked_backward, options, area) for name, area in areas._asdict().items()}
    d_q, d_k, d_v, d_bias = by_platform(chunked, operands, outputs, cotangents)
    return d_q, d_k, d_v, None, None, d_bias


def chunked_backward(options: Options, area: int, operands, outputs, cotangents) -> tuple:
    (q, k, v, mask, blocks, bias), (out, lse), (d_out, d_lse) = operands, outputs, cotangents
    grid = Grid.of(options, area, q, k, v, mask, blocks, bias)
    # A query without keys has logits −inf, so any finite offset gives zero weights.
    of_tokens = (out, d_out, d_lse[..., None], jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    rows = grid.rows(q, blocks, bias), tuple(grid.cut(x) for x in of_tokens)
    with_bias = bias is not None and options.trained_bias

    def chunk(carry, rows):
        d_k, d_v = carry
        row, of_tokens = rows
        out, d_out, d_lse, lse = (grid.heads_first(x) for x in of_tokens)
        logits, keys = grid.logits(row)
        weights = jnp.exp(logits - lse)
        delta = jnp.sum(out * d_out, axis=-1, keepdims=True) - d_lse
        d_logits = weights * (grid.dot("rqd,rkd->rqk", d_out, grid.gather(grid.v, row)) - delta)
        carry = (
            grid.scatter_add(d_k, row, grid.dot("rqd,rqk->rdk", grid.heads_first(row.q), d_logits)),
            grid.scatter_add(d_v, row, grid.dot("rqd,rqk->rdk", d_out, weights)),
        )
        d_q = options.scale * grid.dot("rqk,rkd->rqd", d_logits, keys)
        return carry, (grid.tokens(d_q).astype(q.dtype), grid.of_bias(d_logits, row) if with_bias else None)

    carry = tuple(
        jnp.zeros((len(x), k.shape[2], x.shape[-1], options.block_size), grid.dtype) for x in (grid.k, grid.v)
    )
    carry, (d_q, d_bias) = jax.lax.scan(chunk, carry, grid.chunks(rows))
    # The barrier keeps XLA from folding the transposition into the slow product.
    d_k, d_v = (x.transpose(0, 3, 1, 2) for x in jax.lax.optimization_barrier(carry))
    d_k, d_v = (options.scale * d_k).reshape(k.shape).astype(k.dtype), d_v.reshape(v.shape).astype(v.dtype)
    return grid.paste(d_q), d_k, d_v, grid.paste(d_bias[:, :, None]).swapaxes(1, 2) if with_bias else None


class Row(NamedTuple):
    """One block of queries of one example, or a chunk of blocks along a leading axis.

    Attributes:
      q: `[block, heads, head_dim]`.
      block: index of the block within its example.
      first: index of the example's first key block among the key blocks of all examples.
      listed: `[lists, n]`, the key blocks of the example that the queries see, −1 for none.
      bias: `[lists, n, 1 or block]` or None.
    """

    q: jax.Array
    block: jax.Array
    first: jax.Array
    listed: jax.Array
    bias: jax.Array | None


class Grid(NamedTuple):
    """Keys and values of all examples in one list of blocks, and the indices of each row's blocks.

    Query heads that share a list and a group of keys are treated as more queries of one head; `lists` is the number of
    such merged heads.

    Attributes:
      k, v: `[blocks, block, groups, dim]`.
      real: `[blocks, block]`.
      area: weights per chunk.
      dtype: of all arithmetic.
    """

    k: jax.Array
    v: jax.Array
    real: jax.Array
    area: int
    dtype: jnp.dtype
    lists: int
    listed: int
    heads: int
    batch: int
    query_blocks: int
    key_blocks: int
    options: Options

    @classmethod
    def of(cls, options: Options, area: int, q, k, v, mask, blocks, bias) -> "Grid":
        size, (batch, queries, heads, _) = options.block_size, q.shape
        if mask is None:
            mask = jnp.broadcast_to(jnp.arange(k.shape[1]) < options.keys, k.shape[:2])
        k, v, real = (x.reshape(-1, size, *x.shape[2:]) for x in (k, v, mask))
        each = blocks.shape[1] if bias is None else max(blocks.shape[1], bias.shape[1])
        lists, dtype = k.shape[2] if each == 1 else heads, jnp.promote_types(q.dtype, jnp.float32)
        return cls(
            k, v, real, area, dtype, lists, blocks.shape[3], heads, batch, queries // size, len(k) // batch, options
        )

    def cut(self, x: jax.Array) -> jax.Array:
        """`[batch, padded queries, heads, dim]` as rows, `[rows, block, heads, dim]`."""
        return x.reshape(-1, self.options.block_size, *x.shape[2:])

    def paste(self, x: jax.Array) -> jax.Array:
        """Chunks of results `[chunks, rows per chunk, block, heads, dim]` as `[batch, blocks · block, heads, dim]`."""
        x = x.reshape(-1, *x.shape[2:])[: self.batch * self.query_blocks]
        return x.reshape(self.batch, -1, *x.shape[2:])

    def rows(self, q: jax.Array, blocks: jax.Array, bias: jax.Array | None) -> Row:
        """The rows of all examples."""
        each = self.batch, self.query_blocks

        def lists(x):
            x = jnp.broadcast_to(x, (self.batch, *x.shape[1:])).swapaxes(1, 2)
            return x.reshape(-1, *x.shape[2:])

        return Row(
            q=self.cut(q),
            block=jnp.broadcast_to(jnp.arange(self.query_blocks), each).reshape(-1),
            first=jnp.broadcast_to(jnp.arange(self.batch)[:, None] * self.key_blocks, each).reshape(-1),
            listed=lists(blocks),
            bias=None if bias is None else lists(bias),
        )

    def chunks(self, rows):
        """The arrays of `rows`, `[rows, ...]`, as `[chunks, rows per chunk, ...]`, padded with rows that list block 0.

        The padding rows have zero cotangents and are dropped from the results.
        """
        area = self.options.block_size**2 * self.listed * self.heads
        rows_in_all = self.batch * self.query_blocks
        count = -(-rows_in_all // min(rows_in_all, max(1, self.area // area)))
        size = -(-rows_in_all // count)

        def split(x):
            x = jnp.pad(x, ((0, count * size - rows_in_all), *((0, 0),) * (x.ndim - 1)))
            return x.reshape(count, size, *x.shape[1:])

        return jax.tree.map(split, rows)

    def heads_first(self, x: jax.Array) -> jax.Array:
        """`[rows, block, heads, dim]` as `[rows · lists, queries, dim]`."""
        rows, block, _, dim = x.shape
        x = x.astype(self.dtype).reshape(rows, block, self.lists, -1, dim).transpose(0, 2, 3, 1, 4)
        return x.reshape(rows * self.lists, -1, dim)

    def tokens(self, x: jax.Array) -> jax.Array:
        """The inverse of `heads_first`."""
        block, dim = self.options.block_size, x.shape[-1]
        x = x.reshape(-1, self.lists, self.heads // self.lists, block, dim).transpose(0, 3, 1, 2, 4)
        return x.reshape(-1, block, self.heads, dim)

    def places(self, row: Row) -> tuple[jax.Array, jax.Array]:
        """The blocks and groups that a chunk needs, `[rows, lists, n]` and `[lists, 1]`; block 0 for none."""
        found = row.first[:, None, None] + jnp.maximum(row.listed, 0)
        found = jnp.broadcast_to(found, (len(found), self.lists, self.listed))
        return found, (jnp.arange(self.lists) * self.k.shape[2] // self.lists)[:, None]

    def gather(self, x: jax.Array, row: Row) -> jax.Array:
        """The listed blocks of `x` `[blocks, block, groups, dim]`, as `[rows · lists, n · block, dim]`."""
        block, group = self.places(row)
        return x[block, :, group].astype(self.dtype).reshape(len(block) * self.lists, -1, x.shape[-1])

    def listed_keys(self, row: Row) -> jax.Array:
        """Which keys of the listed blocks are real, bool `[rows, lists or 1, n, block]`."""
        return self.real[row.first[:, None, None] + jnp.maximum(row.listed, 0)] & (row.listed >= 0)[..., None]

    def scatter_add(self, x: jax.Array, row: Row, update: jax.Array) -> jax.Array:
        """`x` `[blocks, groups, dim, block]` plus `update` `[rows · lists, dim, n · block]` at the listed blocks."""
        block, group = self.places(row)
        update = update.reshape(*block.shape[:2], update.shape[1], self.listed, -1).swapaxes(2, 3)
        return x.at[block, group].add(update)

    def dot(self, formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, y, precision=self.options.precision)

    def logits(self, row: Row) -> tuple[jax.Array, jax.Array]:
        """Logits `[rows · lists, queries, n · block]`, −inf where unseen, and keys `[rows · lists, n · block, dim]`."""
        size, keys = self.options.block_size, self.gather(self.k, row)
        logits = self.dot("rqd,rkd->rqk", self.options.scale * self.heads_first(row.q), keys)
        flat, inside = logits.shape, jnp.arange(size)
        # [rows, lists, query heads of a list, queries, n · block]
        logits = logits.reshape(-1, self.lists, self.heads // self.lists, size, self.listed * size)

        def of_keys(x):
            return x.reshape(*x.shape[:2], 1, 1, self.listed * size)

        bias = 0 if row.bias is None else row.bias
        logits += of_keys(jnp.where(self.listed_keys(row), bias, -jnp.inf)).astype(logits.dtype)
        query = (row.block[:, None] * size + inside)[:, None, None, :, None]
        seen = self.options.seen(query, of_keys(row.listed[..., None] * size + inside))
        logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
        return logits.reshape(flat), keys

    def of_bias(self, d_logits: jax.Array, row: Row) -> jax.Array:
        """The cotangent of `row.bias` from that of the logits: sums over all that a number was added to."""
        lists, n, size = row.bias.shape[1:]
        d_bias = d_logits.sum(1).reshape(len(row.bias), self.lists, n, -1)
        d_bias = d_bias if lists == self.lists else d_bias.sum(1, keepdims=True)
        return d_bias if size > 1 else d_bias.sum(-1, keepdims=True)
