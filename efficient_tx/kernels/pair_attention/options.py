"""What an implementation of pair_attention has to know besides its arrays."""

from collections.abc import Callable
from typing import NamedTuple

import jax

# (q `[queries, 1, dim]`, k2 `[queries or 1, second tokens, dim]`) -> what meets the first tokens, `[queries, second
# tokens, dim]`, and what the score has besides, `[queries or 1, second tokens]`.
Pair = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Options(NamedTuple):
    """Static and hashable; see `pair_attention`."""

    pair: Pair
    causal: bool
    windows: tuple[int | None, int | None]
