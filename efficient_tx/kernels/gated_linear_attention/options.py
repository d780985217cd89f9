"""The static options of an implementation of gated_linear_attention."""

from typing import NamedTuple

import jax


class Options(NamedTuple):
    """Static and hashable; see `gated_linear_attention`."""

    scale: float
    reverse: bool
    precision: jax.lax.PrecisionLike
