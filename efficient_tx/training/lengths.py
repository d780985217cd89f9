"""Lengths: a micro-batch is computed at the shortest of a few lengths that holds its longest example.

No output of a model, and no draw, depends on how far a batch is padded. So the sums are those of the full length.
"""

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")
Batch = Mapping[str, jax.Array]

# Blocks of attention and lanes of a vector unit are multiples or parts of this many tokens.
MULTIPLE = 32


def steps_to(length: int, count: int) -> list[int]:
    """At most `count` lengths, about evenly spaced, the last of which is `length`; the others are multiples of 32."""
    width = MULTIPLE * math.ceil(length / (MULTIPLE * count))
    return [*range(width, length, width), length]


def needed(batch: Batch) -> jax.Array:
    """Positions up to the last real token of each row, of a pair the longer one, int32 `[b]`."""
    masks = jnp.stack([batch[name] for name in ("mask", "mask2") if name in batch])
    return jnp.max(jnp.where(masks, jnp.arange(1, masks.shape[-1] + 1), 0), axis=(0, 2))


def shortest_first(batch: Batch) -> Batch:
    """The same rows in another order, so that micro-batches hold rows of similar length."""
    order = jnp.argsort(needed(batch))
    return {name: array[order] for name, array in batch.items()}


def at_needed_length(function: Callable[[Batch], Result], batch: Batch, count: int) -> Result:
    """`function(batch)` with less padding: the batch is cut to one of at most `count` lengths, chosen while it runs.

    Args:
      function: of a batch; it is compiled once for each length.
      batch: arrays `[b, ...]`, those of tokens `[b, length, ...]`; with a `mask`.
    """
    length = batch["mask"].shape[1]
    sizes = steps_to(length, count)

    def cut(batch: Batch, size: int) -> Batch:
        return {name: x[:, :size] if x.ndim > 1 and x.shape[1] == length else x for name, x in batch.items()}

    index = jnp.searchsorted(jnp.array(sizes), jnp.max(needed(batch)))
    return jax.lax.switch(index, [lambda batch, size=size: function(cut(batch, size)) for size in sizes], batch)
