"""The options of an implementation of sampled_block_attention."""

from typing import NamedTuple

import jax


class Sizes(NamedTuple):
    """Rows per tile of queries and per block of keys; static."""

    tile: int
    block: int


class Choice(NamedTuple):
    """The keys that each query sees; the leading axis has one sequence for each example and head.

    Queries are sorted into query rows, keys into key rows. An index out of bounds means none.

    Attributes:
      q_order: int32 `[sequences, query rows]`, the query in each row; fast if rows are sorted by `block`.
      q_place: int32 `[sequences, queries]`, the row of each query.
      k_order: int32 `[sequences, key rows]`, the key in each row.
      k_place: int32 `[sequences, keys]`, the row of each key.
      block: int32 `[sequences, query rows]`, the block of key rows that a query sees; −1 in empty rows.
      group: int32 `[sequences, query rows / tile]`, the sample group that the queries of a tile see; all queries that
        see one block see one group.
      sample: int32 `[sequences, groups, samples]`, the key rows of the sampled keys.
      offset: `[sequences, groups, samples]`, added to the logits of a sampled key; −inf removes the key.
    """

    q_order: jax.Array
    q_place: jax.Array
    k_order: jax.Array
    k_place: jax.Array
    block: jax.Array
    group: jax.Array
    sample: jax.Array
    offset: jax.Array


def rows_of(x: jax.Array, index: jax.Array, fill: float = 0) -> jax.Array:
    """Rows `index` of `x` `[length, ...]`; `fill` where the index is `length`."""
    return x.at[index].get(mode="fill", fill_value=fill)
