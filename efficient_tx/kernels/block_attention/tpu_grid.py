"""The grid of block attention's passes on a TPU: which blocks of its operands a program has.

The lists are prefetched scalars, which the indices of blocks are computed from. A block that is not there is one that
is loaded already.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from efficient_tx.kernels.block_attention.lists import transposed, with_repeats
from efficient_tx.kernels.block_attention.options import Options
from efficient_tx.kernels.shapes import result

LANES = 128


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Listed tokens of a step, at least one block, and query heads of a program, if they share a list."""

    tokens: int = 256
    heads: int = 8


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid of a pass and the blocks of its operands.

    Those are `[batch, heads, length, dim]`, or `[batch, heads, dim, length]` where this takes less memory: the last
    axis is padded to 128, and what is loaded of it has 128 numbers or a multiple, a tile. So a tile may have several
    short blocks, of which a program takes its own; neighbours in a list, or in one slot of successive lists, share it.

    Attributes:
      dim, v_dim: of queries and keys, and of values.
      groups, repeats: heads of keys of a program, and query heads of each.
      each: programs of an example.
      share: neighbouring programs that have the same keys, because every query head has its own list.
      lists: `(batch or 1, programs or 1)` of the index lists, of the added rows too.
      slots: blocks of a step.
      limit: most blocks of a step.
    """

    options: Options
    dim: int
    v_dim: int
    batch: int
    heads: int
    query_blocks: int
    key_blocks: int
    n: int
    groups: int
    repeats: int
    each: int
    share: int
    lists: tuple[int, int]
    added: tuple[int, int] | None
    slots: int
    limit: int

    @classmethod
    def of(cls, options: Options, sizes: BlockSizes, q, k, v, blocks, rows) -> "Grid":
        (batch, length, heads, dim), groups, size = q.shape, k.shape[2], options.block_size
        dims = dim, v.shape[3]
        # Of tiles at most four times as many tokens are loaded as are used.
        tile = max(size, LANES) if any(tiled(size, x) for x in dims) else size
        limit = max(1, min(sizes.tokens // size, 4 * sizes.tokens // tile))
        slots = min(blocks.shape[3], limit)
        if blocks.shape[1] == 1 and (rows is None or rows.shape[1] == 1):
            repeats, share = heads // groups, 1
            # What a program holds of each block: inputs and outputs twice, since the next are on their way, and sums.
            block = 4 * sum(tile * x if tiled(size, x) else size * -(-x // LANES) * LANES for x in dims)
            held = block * (3 * repeats + 2) + 2 * slots * block
            most = min(max(1, sizes.heads // repeats), max(1, (8 << 20) // held))
            together = max(g for g in range(1, groups + 1) if groups % g == 0 and g <= most)
            each = groups // together
        else:
            together, repeats, each, share = 1, 1, heads, heads // groups
        return cls(
            options, dim, v.shape[3], batch, heads, length // size, k.shape[1] // size, blocks.shape[3], together,
            repeats, each, share, blocks.shape[:2], None if rows is None else rows.shape[:2], slots, limit,
        )  # fmt: skip

    @property
    def together(self) -> int:
        """Query heads of a program."""
        return self.groups * self.repeats

    @property
    def steps(self) -> int:
        return -(-self.n // self.slots)

    def place(self, b, p, counts: tuple[int, int]):
        """The index of a program's list among those of all."""
        return (b if counts[0] > 1 else 0) * counts[1] + (p if counts[1] > 1 else 0)

    def at(self, b, p, i, step):
        """Where in the flat lists those of a step start."""
        return ((self.place(b, p, self.lists) * self.query_blocks + i) * self.steps + step) * self.slots

    @property
    def per_tile(self) -> int:
        """Blocks of a tile, where the length is the last axis."""
        return max(1, LANES // self.options.block_size)

    def last(self, dim: int) -> bool:
        """Whether the length is the last axis."""
        return tiled(self.options.block_size, dim)

    def shape(self, blocks: int, dim: int) -> tuple[int, int]:
        """The last two axes of an operand of so many blocks."""
        size = self.options.block_size
        return (dim, -(-blocks // self.per_tile) * self.per_tile * size) if self.last(dim) else (blocks * size, dim)

    def laid(self, x: jax.Array) -> jax.Array:
        """`[batch, length, heads, dim]` as the operand of a pass."""
        if not self.last(x.shape[3]):
            return x.transpose(0, 2, 1, 3)
        x = x.transpose(0, 2, 3, 1)
        return jnp.pad(x, ((0, 0),) * 3 + ((0, -x.shape[3] % (self.per_tile * self.options.block_size)),))

    def unlaid(self, x: jax.Array, blocks: int, dim: int) -> jax.Array:
        """The inverse, of so many blocks."""
        if not self.last(dim):
            return x.transpose(0, 2, 1, 3)
        return x[..., : blocks * self.options.block_size].transpose(0, 3, 1, 2)

    def spec(self, heads: int, dim: int, place: Callable) -> pl.BlockSpec:
        """A block of tokens of some heads, or its tile; `place` returns the indices of example, heads and block."""
        size = self.options.block_size
        if not self.last(dim):
            return pl.BlockSpec((None, heads, size, dim), lambda *at: (*place(*at), 0))

        def index(*at):
            b, h, block = place(*at)
            return b, h, 0, jax.lax.div(block, jnp.int32(self.per_tile))

        return pl.BlockSpec((None, heads, dim, self.per_tile * size), index)

    def tokens(self, ref: Any, head: int, block: jax.Array, dim: int) -> jax.Array:
        """A block of a head, `[size, dim]`; any block if `block` is negative."""
        x = self.stacked([ref], head, [block], dim)
        return x.T if self.last(dim) else x

    def stacked(self, refs: list, head: int, blocks: list, dim: int) -> jax.Array:
        """Blocks of a head in a row, `[tokens, dim]`, or `[dim, tokens]` where the length is the last axis."""
        parts = [ref[head] for ref in refs]
        if self.last(dim) and self.per_tile > 1:
            size, count = self.options.block_size, self.per_tile
            lane = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
            tiles = []
            for n, (x, block) in enumerate(zip(parts, blocks)):
                place = n % count
                # To its place in a tile; hardware turns 32 bits.
                turns = jax.lax.rem(place + count - jax.lax.rem(block, jnp.int32(count)), jnp.int32(count))
                x = pltpu.roll(x.astype(jnp.float32), turns * size, 1).astype(x.dtype)
                tiles = [*tiles, x] if place == 0 else [*tiles[:-1], jnp.where(lane < place * size, tiles[-1], x)]
            return jnp.concatenate(tiles, axis=1)[:, : len(refs) * size]
        return jnp.concatenate(parts, axis=1 if self.last(dim) else 0)

    def put(self, ref: Any, head: int, block: jax.Array, x: jax.Array) -> None:
        """Writes a block `[size, dim]` of a head, beside those that its tile has already."""
        if self.last(x.shape[1]):
            x = x.T
            if self.per_tile > 1:
                x = jnp.concatenate([x] * self.per_tile, axis=1)
                place = jax.lax.rem(block, jnp.int32(self.per_tile))
                lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
                own = jax.lax.div(lane, jnp.int32(self.options.block_size)) == place
                x = jnp.where(own, x, ref[head].astype(x.dtype))
        ref[head] = x.astype(ref.dtype)

    def of_queries(self, dim: int) -> pl.BlockSpec:
        return self.spec(self.together, dim, lambda b, p, i, step, _: (b, p, i))

    def of_query_rows(self) -> pl.BlockSpec:
        """Numbers of the queries, `[batch, heads, query blocks, 1, block_size]`."""
        shape = None, self.together, None, 1, self.options.block_size
        return pl.BlockSpec(shape, lambda b, p, i, step, _: (b, p, i, 0, 0))

    def listed(self, x: jax.Array, dim: int) -> list:
        """The array once for every slot."""

        def spec(slot):
            def index(b, p, i, step, listed):
                block = listed[self.at(b, p, i, step) + slot]
                return b, jax.lax.div(p, self.share), jnp.maximum(block, ~block)

            return self.spec(self.groups, dim, index)

        return [(x, spec(slot)) for slot in range(self.slots)]

    def rows(self, rows: jax.Array | None) -> list:
        if rows is None:
            return []
        rows = jnp.pad(rows, ((0, 0),) * 3 + ((0, self.steps * self.slots - self.n), (0, 0)))
        rows = rows.reshape(-1, self.query_blocks, self.steps, 1, self.slots * self.options.block_size)
        shape = None, None, None, 1, rows.shape[-1]
        return [(rows, pl.BlockSpec(shape, lambda b, p, i, step, _: (self.place(b, p, self.added), i, step, 0, 0)))]

    def d_rows(self, wanted: bool) -> list:
        shape = self.batch, self.each, self.query_blocks, self.steps, 1, self.slots * self.options.block_size
        spec = pl.BlockSpec((None,) * 4 + shape[4:], lambda b, p, i, step, _: (b, p, i, step, 0, 0))
        return [(shape, jnp.float32, spec)] if wanted else []

    def by_query(self, kernel, operands, results, scratch, blocks, cost, interpret) -> list[jax.Array]:
        """A pass over the blocks of queries and, in order, their lists."""
        missing = self.steps * self.slots - self.n
        listed = jnp.pad(blocks, ((0, 0),) * 3 + ((0, missing),), constant_values=-1)
        listed = with_repeats(listed.reshape(*self.lists, -1, self.slots)).reshape(-1)
        grid = self.batch, self.each, self.query_blocks, self.steps
        return self.call(kernel, grid, [listed], operands, results, scratch, cost, interpret)

    def by_key(self, kernel, q, k, v, d_out, lse, delta, rows, blocks, interpret) -> list[jax.Array]:
        """The pass over the blocks of keys and, in order, the blocks of queries that list them: d_k and d_v."""
        size = self.options.block_size
        slots = min(self.query_blocks, self.limit)
        key, entries = transposed(blocks, self.key_blocks, slots)
        steps = key.shape[-1]

        def of_steps(x):
            """Numbers of the queries of each step, `[batch, heads, steps, 1, slots · block_size]`."""
            query = jnp.maximum(entries, 0) // self.n
            query = query.reshape(*self.lists, steps * slots, 1, 1)
            return jnp.take_along_axis(x, query, axis=2).reshape(self.batch, self.heads, steps, 1, slots * size)

        def at(b, p, step):
            return self.place(b, p, self.lists) * steps + step

        def entry(b, p, step, entries, slot):
            number = entries[at(b, p, step) * slots + slot]
            return jnp.maximum(number, ~number)

        def of_query(slot, dim):
            def index(b, p, step, key, entries):
                return b, p, jax.lax.div(entry(b, p, step, entries, slot), self.n)

            return self.spec(self.together, dim, index)

        def of_entry(slot):
            x = rows.reshape(-1, self.query_blocks * self.n, 1, size)

            def index(b, p, step, key, entries):
                return self.place(b, p, self.added), entry(b, p, step, entries, slot), 0, 0

            return x, pl.BlockSpec((None, None, 1, size), index)

        def of_key(share, dim):
            def index(b, p, step, key, entries):
                return b, jax.lax.div(p, share), key[at(b, p, step)]

            return self.spec(self.groups, dim, index)

        numbers = pl.BlockSpec((None, self.together, None, 1, slots * size), lambda b, p, step, *_: (b, p, step, 0, 0))
        operands = [
            *((x, of_query(slot, dim)) for x, dim in ((q, self.dim), (d_out, self.v_dim)) for slot in range(slots)),
            *((of_steps(x), numbers) for x in (lse, delta)),
            *((x, of_key(self.share, dim)) for x, dim in ((k, self.dim), (v, self.v_dim))),
            *([] if rows is None else map(of_entry, range(slots))),
        ]
        # With lists of their own, query heads that share keys have parts of the sums.
        parts = jnp.float32 if self.share > 1 else k.dtype
        results = [
            ((self.batch, self.each * self.groups, *x.shape[2:]), parts, of_key(1, dim))
            for x, dim in ((k, self.dim), (v, self.v_dim))
        ]
        scratch = [(self.groups, size, dim) for dim in (self.dim, self.v_dim)]
        entries = with_repeats(entries.reshape(*self.lists, steps, slots)).reshape(-1)
        sums = self.call(
            partial(kernel, slots, steps), (self.batch, self.each, steps), [key.reshape(-1), entries], operands,
            results, scratch, (6 * self.dim + 4 * self.v_dim, slots * size), interpret,
        )  # fmt: skip
        shape = self.batch, -1, self.share
        return [x if self.share == 1 else x.reshape(*shape, *x.shape[2:]).sum(2).astype(k.dtype) for x in sums]

    def call(self, kernel, grid, lists, operands, results, scratch, cost, interpret) -> list[jax.Array]:
        arrays, in_specs = zip(*operands)
        flops, width = cost
        # Successive blocks may write parts of one tile.
        parallel = 2 if self.per_tile > 1 else len(grid) - 1
        weights = self.options.block_size * width * self.together
        for count in grid:
            weights *= count
        shapes = [result(shape, dtype, (arrays, lists)) for shape, dtype, _ in results]
        return pl.pallas_call(
            kernel,
            shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(lists),
                grid=grid,
                in_specs=in_specs,
                out_specs=[spec for _, _, spec in results],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            ),
            cost_estimate=pl.CostEstimate(
                flops=weights * flops // 2,
                transcendentals=weights,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
            ),
            interpret=interpret,
            name=f"block_attention_{kernel.func.__name__}",
        )(*lists, *arrays)


def tiled(size: int, dim: int) -> bool:
    """Whether arrays of this dim have blocks of this size in tiles, the length last."""
    return dim % LANES != 0 and (size % LANES == 0 or LANES % size == 0)
