"""Lengths: a micro-batch is computed at the shortest of a few lengths that holds its longest example.

No output of a model, and no draw, depends on how far a batch is padded. So the sums are those of the full length.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from efficient_tx.task import Batch

Result = TypeVar("Result")

# Blocks of attention and lanes of a vector unit are multiples or parts of this many tokens.
MULTIPLE = 32


def steps_to(length: int, count: int) -> list[int]:
    """At most `count` lengths, evenly spaced multiples of 32, the last of which is `length` itself."""
    multiples = {MULTIPLE * math.ceil(length * part / (count * MULTIPLE)) for part in range(1, count)}
    return [*sorted(size for size in multiples if size <= length - MULTIPLE), length]


def ends(batch: Batch) -> jax.Array:
    """Positions up to the last real or labelled token of each row, of a pair the longer one, int32 `[b]`."""
    seen = [batch[name] for name in ("mask", "mask2") if name in batch]
    if batch["weight"].ndim == 2:  # an example's own mask may leave out tokens whose labels count
        seen.append(batch["weight"] > 0)
    stacked = jnp.stack(seen)
    return jnp.max(jnp.where(stacked, jnp.arange(1, stacked.shape[-1] + 1), 0), axis=(0, 2))


def shortest_first(batch: Batch) -> Batch:
    """The same rows in another order, so that micro-batches hold rows of similar length."""
    order = jnp.argsort(ends(batch))
    return {name: array[order] for name, array in batch.items()}


def at_needed_length(function: Callable[[Batch], Result], batch: Batch, count: int) -> Result:
    """`function(batch)` with less padding: the batch is cut to one of at most `count` lengths, chosen while it runs.

    Args:
      function: of a batch; it is compiled once for each length.
      batch: arrays `[b, ...]`, those of tokens `[b, length, ...]`; with a `mask`, as all but images have.
    """
    length = batch["mask"].shape[1]
    sizes = steps_to(length, count)

    def cut(batch: Batch, size: int) -> Batch:
        return {name: x[:, :size] if x.ndim > 1 and x.shape[1] == length else x for name, x in batch.items()}

    index = jnp.searchsorted(jnp.array(sizes), jnp.max(ends(batch)))
    return jax.lax.switch(index, [lambda batch, size=size: function(cut(batch, size)) for size in sizes], batch)
