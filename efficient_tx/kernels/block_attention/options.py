"""What an implementation of block_attention has to know besides its arrays."""

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
        """Whether these positions may meet, bool of their common shape; None if all may."""
        seen = None
        if self.causal:
            seen = key <= query + (self.keys - self.queries)
        if self.visible is not None:
            visible = self.visible(query, key)
            seen = visible if seen is None else seen & visible
        return seen
