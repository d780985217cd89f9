"""What an implementation of sampled_block_attention has to know besides queries, keys and values."""

from typing import NamedTuple

import jax


class Sizes(NamedTuple):
    """Rows of a tile of queries and of a block of keys; static."""

    tile: int
    block: int


class Choice(NamedTuple):
    """Which keys each query sees; the leading axis counts sequences, heads and examples alike.

    Queries are sorted into rows, keys into others; an index out of bounds says that there is none.

    Attributes:
      q_order: int32 `[sequences, query rows]`, the query in each row, by `block` if it is to be quick.
      q_place: int32 `[sequences, queries]`, the row of each query.
      k_order: int32 `[sequences, key rows]`, the key in each row.
      k_place: int32 `[sequences, keys]`, the row of each key.
      block: int32 `[sequences, query rows]`, the block of key rows that a query sees; −1 in empty rows.
      group: int32 `[sequences, query rows / tile]`, which sample the queries of a tile see.
      sample: int32 `[sequences, groups, samples]`, the rows of the sampled keys.
      offset: `[sequences, groups, samples]`, what the logits of a sampled key are raised by; −inf takes it out.
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
