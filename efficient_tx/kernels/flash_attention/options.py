"""The static options of an implementation of flash_attention."""

from typing import NamedTuple

import jax


class Options(NamedTuple):
    """Static and hashable: the inner products that a score sees are scale · q·k + bias."""

    scale: float
    bias: float
    precision: jax.lax.PrecisionLike
