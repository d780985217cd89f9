"""Block attention in XLA: memory linear in the lengths, forward and backward; written for CPUs.

A row is one block of queries with all its heads. Rows are independent: a chunk of rows gathers its key blocks and
computes one batched product. So small blocks cost no more than large ones, and no whole array is transposed. A row
processes all its keys at once and needs no running maximum. The backward pass recomputes the weights from the saved
log-sum-exp.

A chunk of weights is never the transposed left factor of a product, because XLA's CPU backend runs that at a quarter of
the speed. So the cotangents of keys and values are summed as `[dim, block]`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.block_attention.options import Options

# 1 MB of float32 weights per chunk. On two AVX-512 cores with 1 MB of L2 cache each, a quarter and four times of it are
# slower at most block sizes.
CHUNK_AREA = 512 * 512


def unsupported(*, interpret: bool) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    return "interpret=True is for Pallas kernels, this one has nothing to interpret" if interpret else None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, blocks: jax.Array, bias: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output `[batch, padded queries, heads, v_dim]` and log-sum-exp `[batch, padded queries, heads]`.

    `q`, `k`, `v` have one dtype, float32 or float64, and lengths that are multiples of the block size; `real` is bool
    `[batch, padded keys]`, `blocks` int32 `[batch, heads or 1, query blocks, n]`, `bias` of the same shape or None.
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
        return grid.tokens(out), grid.tokens(jnp.where(found, jnp.log(total) + peak, -jnp.inf))

    out, lse = jax.lax.map(chunk, grid.chunks(grid.rows(q, blocks, bias)))
    return grid.paste(out), grid.paste(lse)[..., 0]


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, blocks: jax.Array, bias: jax.Array | None,
    out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array, options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:  # fmt: skip
    """Cotangents of q, k, v and bias, from the inputs and outputs of `forward` and the cotangents of the outputs."""
    grid = Grid.of(q, k, v, real, blocks, options)
    # A query without keys has logits −inf, so any finite offset gives zero weights.
    of_tokens = (out, d_out, d_lse[..., None], jnp.where(jnp.isfinite(lse), lse, 0)[..., None])
    rows = grid.rows(q, blocks, bias), tuple(grid.cut(x) for x in of_tokens)

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
        d_bias = None if bias is None else d_logits.sum(1).reshape(*row.bias.shape, -1).sum(-1)
        return carry, (grid.tokens(options.scale * grid.dot("rqk,rkd->rqd", d_logits, keys)), d_bias)

    carry = tuple(
        jnp.zeros_like(x, shape=(len(x), k.shape[2], x.shape[-1], options.block_size)) for x in (grid.k, grid.v)
    )
    carry, (d_q, d_bias) = jax.lax.scan(chunk, carry, grid.chunks(rows))
    # The barrier keeps XLA from folding the transposition into the slow product.
    d_k, d_v = (x.transpose(0, 3, 1, 2) for x in jax.lax.optimization_barrier(carry))
    d_bias = None if bias is None else grid.paste(d_bias[:, :, None]).swapaxes(1, 2)
    return grid.paste(d_q), options.scale * d_k.reshape(k.shape), d_v.reshape(v.shape), d_bias


class Row(NamedTuple):
    """One block of queries of one example, or a chunk of blocks along a leading axis.

    Attributes:
      q: `[block, heads, head_dim]`.
      block: index of the block within its example.
      first: index of the example's first key block among the key blocks of all examples.
      listed: `[lists, n]`, the key blocks of the example that the queries see, −1 for none.
      bias: `[lists, n]` or None.
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
    """

    k: jax.Array
    v: jax.Array
    real: jax.Array
    lists: int
    listed: int
    heads: int
    batch: int
    query_blocks: int
    key_blocks: int
    options: Options

    @classmethod
    def of(
        cls, q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, blocks: jax.Array, options: Options
    ) -> "Grid":
        size = options.block_size
        k, v, real = (x.reshape(-1, size, *x.shape[2:]) for x in (k, v, real))
        batch, queries, heads, _ = q.shape
        lists = k.shape[2] if blocks.shape[1] == 1 else heads
        return cls(k, v, real, lists, blocks.shape[3], heads, batch, queries // size, len(k) // batch, options)

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
            return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])

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
        count = -(-rows_in_all // min(rows_in_all, max(1, CHUNK_AREA // area)))
        size = -(-rows_in_all // count)

        def split(x):
            x = jnp.pad(x, ((0, count * size - rows_in_all), *((0, 0),) * (x.ndim - 1)))
            return x.reshape(count, size, *x.shape[1:])

        return jax.tree.map(split, rows)

    def heads_first(self, x: jax.Array) -> jax.Array:
        """`[rows, block, heads, dim]` as `[rows · lists, queries, dim]`."""
        rows, block, _, dim = x.shape
        x = x.reshape(rows, block, self.lists, -1, dim).transpose(0, 2, 3, 1, 4)
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
        """The listed blocks of `x` `[blocks, block, groups, dim]`, as `[rows · lists, n · block, dim]`; zero if masked.

        A zero weight times NaN or infinity in the padding would be NaN.
        """
        block, group = self.places(row)
        found = jnp.where(self.listed_keys(row)[..., None], x[block, :, group], 0)
        return found.reshape(len(block) * self.lists, -1, x.shape[-1])

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

        bias = 0 if row.bias is None else row.bias[..., None]
        logits += of_keys(jnp.where(self.listed_keys(row), bias, -jnp.inf)).astype(logits.dtype)
        query = (row.block[:, None] * size + inside)[:, None, None, :, None]
        seen = self.options.seen(query, of_keys(row.listed[..., None] * size + inside))
        logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
        return logits.reshape(flat), keys
