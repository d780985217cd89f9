"""The static options of an implementation of block_attention."""

from collections.abc import Callable
from typing import NamedTuple

import jax


class Options(NamedTuple):
    """Static and hashable."""

    block_size: int
    queries: int
    keys: int
    causal: bool
    visible: Callable[[jax.Array, jax.Array], jax.Array] | None
    scale: float
    precision: jax.lax.Precision

    def seen(self, query: jax.Array, key: jax.Array) -> jax.Array | None:
        """Whether the queries see the keys at these positions, bool of their common shape; None if all do."""
        seen = None
        if self.causal:
            seen = key <= query + (self.keys - self.queries)
        if self.visible is not None:
            visible = self.visible(query, key)
            seen = visible if seen is None else seen & visible
        return seen
