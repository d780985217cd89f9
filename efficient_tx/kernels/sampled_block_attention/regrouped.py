"""Attention to a block and to samples as attention to listed blocks: the form for GPUs and TPUs.

Queries that see one block of keys are put together and padded to whole tiles. Then each tile lists the tiles of its
block, and those of its samples, which stand behind the keys as if they were more of them. The offset of a sample is a
bias of the listed key, −inf for samples in the block itself. There are at most (queries / tile + blocks) tiles.

In a row without a query or key stands one of the same sequence that is in a row, so that one gather copies an array;
such a query has the weight 0 in the backward pass, such a key always. NaN in that one reaches what sees such rows.
Where no key is in a row, nothing that is computed is looked at.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.kernels.block_attention.lists import transposed
from efficient_tx.kernels.block_attention.options import Options
from efficient_tx.kernels.sampled_block_attention.options import Choice, Sizes, rows_of


def unsupported(listed: ModuleType, sizes: Sizes, *operands: Any) -> str | None:
    """The reason why an implementation of block_attention does not support this, or None."""
    tiles = jax.eval_shape(lambda *x: Tiles.of(sizes, *x).operands(*x), *operands)
    return listed.unsupported(options(sizes, *tiles), *tiles)


def forward(listed: ModuleType, sizes: Sizes, *operands: Any, **interpret: Any) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp by an implementation of block_attention; see `sampled_block_attention`."""
    tiles = Tiles.of(sizes, *operands)
    arrays = tiles.operands(*operands)
    chosen = options(sizes, *arrays)
    (out, lse), _ = listed.forward(chosen, listed.sizes(chosen, *arrays), *arrays, **interpret)
    return tiles.back(out), tiles.back(lse[..., None], -jnp.inf)[..., 0]


def backward(
    listed: ModuleType, sizes: Sizes, operands: tuple, outputs: tuple, cotangents: tuple, **interpret: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of q, k and v."""
    tiles, choice = Tiles.of(sizes, *operands), operands[3]
    arrays = tiles.operands(*operands)
    chosen = options(sizes, *arrays)
    (out, lse), given = ((tiles.queries(x), tiles.queries(y[..., None])[..., 0]) for x, y in (outputs, cotangents))
    # Finite: what is not is the log-sum-exp of a query without keys.
    here = tiles.order[..., None] < operands[0].shape[1]
    kept = out, jnp.where(here, lse, jnp.finfo(lse.dtype).max)
    d_q, d_k, d_v, *_ = listed.backward(chosen, listed.sizes(chosen, *arrays), arrays, kept, None, given, **interpret)

    def of_keys(x):
        rows, (_, groups, count) = choice.k_order.shape[1], choice.sample.shape

        def one(x, choice):
            drawn = x[rows:].reshape(groups, -1, x.shape[-1])[:, :count]
            return rows_of(x[:rows].at[choice.sample].add(drawn), choice.k_place)

        return jax.vmap(one)(x[:, :, 0], choice)

    return tiles.back(d_q), of_keys(d_k), of_keys(d_v)


def through(listed: ModuleType) -> tuple[Callable, Callable, Callable, Callable]:
    """`unsupported`, `sizes`, `forward` and `backward` of an implementation by these kernels of block_attention."""

    def through_forward(options, sizes, *operands, interpret=False):
        return forward(listed, options, *operands, interpret=interpret), None

    def through_backward(options, sizes, operands, outputs, saved, cotangents, *, interpret=False):
        return *backward(listed, options, operands, outputs, cotangents, interpret=interpret), None

    # Block sizes are block_attention's own.
    return partial(unsupported, listed), lambda *_: None, through_forward, through_backward


def options(sizes: Sizes, q: jax.Array, k: jax.Array, *others: Any) -> Options:
    return Options(
        block_size=unit(sizes),
        queries=q.shape[1],
        keys=k.shape[1],
        causal=False,
        visible=None,
        scale=1.0,
        precision=jax.lax.Precision.HIGHEST,
        trained_bias=False,
    )


def unit(sizes: Sizes) -> int:
    """Tokens of a tile of queries and of keys."""
    return sizes.block if sizes.block % sizes.tile else sizes.tile


class Tiles(NamedTuple):
    """Tiles of queries that see one block, and where they are.

    Attributes:
      block: int32 `[sequences, tiles]`, the block of keys.
      group: int32 `[sequences, tiles]`, the sample group.
      order: int32 `[sequences, tiles · tile]`, the query in each row, the number of queries for none.
      place: int32 `[sequences, queries]`, the row of each query, the number of rows for none, or where no key is seen.
      sizes: the arguments'.
    """

    block: jax.Array
    group: jax.Array
    order: jax.Array
    place: jax.Array
    sizes: Sizes

    @classmethod
    def of(cls, sizes: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, choice: Choice) -> "Tiles":
        queries, blocks = q.shape[1], choice.k_order.shape[1] // sizes.block

        def one(choice):
            own = jnp.where(choice.q_order < queries, choice.block, -1)
            block, rows = transposed(own[:, None], blocks, unit(sizes))
            order = jnp.where(rows < 0, queries, choice.q_order[rows]).reshape(-1)
            place = (
                jnp.full(queries, order.size).at[order].set(jnp.arange(order.size), mode="drop", unique_indices=True)
            )
            place = jnp.where((choice.k_order < k.shape[1]).any(), place, order.size)
            return block, choice.group[jnp.maximum(rows[:, 0], 0) // sizes.tile], order, place

        return cls(*jax.vmap(one)(choice), sizes)

    def queries(self, x: jax.Array) -> jax.Array:
        """`[sequences, queries, dim]` as `[sequences, rows, 1, dim]`, with one of them in each row without one."""
        return jax.vmap(filled_rows)(x, self.order)[:, :, None]

    def back(self, x: jax.Array, fill: float = 0) -> jax.Array:
        """The inverse; `fill` for a query that is in no row."""
        return jax.vmap(rows_of, (0, 0, None))(x[:, :, 0], self.place, fill)

    def operands(self, q: jax.Array, k: jax.Array, v: jax.Array, choice: Choice) -> tuple:
        """The operands of an implementation of block_attention."""
        size, keys, dtype = unit(self.sizes), k.shape[1], jnp.promote_types(q.dtype, jnp.float32)
        missing = -choice.sample.shape[2] % size
        each, parts = (choice.sample.shape[2] + missing) // size, self.sizes.block // size

        def with_samples(x, choice):
            drawn = jnp.pad(choice.k_order[choice.sample], ((0, 0), (0, missing)), constant_values=keys)
            return filled_rows(x, jnp.concatenate([choice.k_order, drawn.reshape(-1)]))[:, None]

        def lists(block, group, order, choice):
            there = (order.reshape(len(block), size) < q.shape[1]).any(1)[:, None]
            own = block[:, None] * parts + jnp.arange(parts)
            drawn = len(choice.k_order) // size + group[:, None] * each + jnp.arange(each)
            real = jnp.where(choice.k_order < keys, 0.0, -jnp.inf).reshape(-1, size)
            offset = jnp.where(
                choice.sample[group] // self.sizes.block != block[:, None], choice.offset[group], -jnp.inf
            )
            offset = jnp.pad(offset, ((0, 0), (0, missing)), constant_values=-jnp.inf).reshape(len(block), each, size)
            bias = jnp.concatenate([real[own], offset], axis=1)
            seen = there & jnp.isfinite(bias).any(-1)
            blocks = jnp.where(seen, jnp.concatenate([own, drawn], axis=1), -1)
            return blocks[None].astype(jnp.int32), bias[None].astype(dtype)

        k, v = (jax.vmap(with_samples)(x, choice) for x in (k, v))
        return self.queries(q), k, v, None, *jax.vmap(lists)(self.block, self.group, self.order, choice)


def filled_rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows `index` of `x`; where the index is the length of `x`, its first row that is in `index`, else its last."""
    last = len(x) - 1
    index = jnp.where(index > last, jnp.minimum(index.min(), last), index)
    return x.at[index].get(mode="promise_in_bounds")
