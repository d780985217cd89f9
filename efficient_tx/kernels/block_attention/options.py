"""The static options of an implementation of block_attention."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Options(NamedTuple):
    """Static and hashable; see `block_attention`.

    Every implementation takes the operands q `[batch, padded queries, heads, head_dim]`, k `[batch, padded keys, groups,
    head_dim]`, v `[batch, padded keys, groups, v_dim]`, the key mask bool `[batch, padded keys]` or None, blocks int32
    `[batch or 1, heads or 1, query blocks, n]`, and the bias `[batch, heads or 1, query blocks, n, 1 or block_size]` or
    None. Lengths are padded to whole blocks, masked keys and values are zero. It returns the output `[batch, padded
    queries, heads, v_dim]` in the dtype of q and the log-sum-exp `[batch, padded queries, heads]` in float32 at least.
    Nothing is saved for the backward pass but these.

    Attributes:
      queries, keys: the numbers without padding.
      trained_bias: whether the backward pass computes the cotangent of the bias; else it is None.
    """

    block_size: int
    queries: int
    keys: int
    causal: bool
    visible: Callable[[jax.Array, jax.Array], jax.Array] | None
    scale: float
    precision: jax.lax.Precision
    trained_bias: bool = True

    def seen(self, query: jax.Array, key: jax.Array) -> jax.Array | None:
        """Whether the queries see the keys at these positions, bool of their common shape; None if all do."""
        seen = None
        if self.causal:
            seen = key <= query + (self.keys - self.queries)
        if self.visible is not None:
            visible = self.visible(query, key)
            seen = visible if seen is None else seen & visible
        return seen
