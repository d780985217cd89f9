"""Compression of trained models: methods that exchange layers, or cut neurons and heads, within a budget.

A new method is one file and one row of `METHODS`. Every weight structure of `LINEAR` with a projection of its own is a
method as well: that projection of each layer.
"""

from collections.abc import Callable
from functools import partial

from efficient_tx.compression.compressed import Compressed, compress
from efficient_tx.compression.eora import Eora
from efficient_tx.compression.flap import Flap
from efficient_tx.compression.interpolative import Interpolative, Stat
from efficient_tx.compression.low_rank import Truncated, Welore, Whitened
from efficient_tx.compression.method import Method
from efficient_tx.compression.mfac import Mfac
from efficient_tx.compression.projection import Projection
from efficient_tx.compression.reweighted import Reweighted
from efficient_tx.linear import LINEAR

METHODS: dict[str, Callable[..., Method]] = {
    "svd": Truncated,
    "whitened": Whitened,
    "welore": Welore,
    "id": Interpolative,
    "stat": Stat,
    "flap": Flap,
    "wlra": Reweighted,
    "mfac": Mfac,
    **{name: partial(Projection, cls) for name, cls in LINEAR.items() if cls.own_projection},
}
# Methods that follow another one, written after a plus: "monarch+eora".
SECOND: dict[str, Callable[..., Method]] = {"eora": Eora}

# What is compared if nobody says what: not `low_rank`, which is `svd`, and second stages after a rounding and a cut.
COMPARED = (*(name for name in METHODS if name != "low_rank"), "ternary+eora", "flap+eora")

__all__ = ["COMPARED", "METHODS", "SECOND", "Compressed", "Method", "compress"]
