"""The static options of an implementation of pair_attention."""

from collections.abc import Callable
from typing import NamedTuple

import jax

# (q `[queries, 1, dim]`, k2 `[queries or 1, second tokens, dim]`) -> the factor of the first tokens in the score,
# `[queries, second tokens, dim]`, and the rest of the score, `[queries or 1, second tokens]`.
Pair = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class Options(NamedTuple):
    """Static and hashable; see `pair_attention`."""

    pair: Pair
    causal: bool
    windows: tuple[int | None, int | None]
