"""HadamardQuotient: W = (D U) ⊘ (P Q), a low-rank matrix divided entry by entry by another one.

The form of reweighted low-rank approximations with importances of rank above one (Woodruff and Yasuda 2024, arXiv
2406.02431): few numbers, and a rank that may be full.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.checks import at_least
from efficient_tx.linear.structured import Factor, Whole
from efficient_tx.numerics.factorisations import svd

# Denominators below this count as this, and have no gradient. They are about 1.
LEAST = 1e-4


class HadamardQuotient(Whole):
    """y = x ((D U) ⊘ (P Q)), stored as Dᵀ `[rank, in]`, U `[rank, out]`, Pᵀ `[terms, in]` and Q `[terms, out]`.

    The weight is computed in each call, in float32 at least, and multiplied as a dense matrix: it saves bytes, not
    time. At the start the denominators are 1: the terms of P are cosines, the first one all ones, and so is the first
    one of Q, of which the others are zeros.

    `from_dense` finds the best weight of rank `rank`, with denominators of 1, by which it is as near as a low-rank
    layer of this rank. No method is known that finds the nearest quotient. `compression.reweighted` has denominators
    that follow from importances of the entries.

    Args:
      rank: of the numerators, at most the smaller side; None is a quarter of the smaller side.
      terms: of the denominators, their rank.
    """

    paper = "Woodruff and Yasuda 2024, arXiv 2406.02431"
    computes = "(D U) ⊘ (P Q), entry by entry"
    size = "2·n·(rank + terms)"
    nearest = "singular value decomposition, for denominators of 1"
    own_projection = False  # it is that of `LowRank`

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[int]]:
        return "rank", range(1, min(n, m) + 1)

    def __init__(self, in_features: int, out_features: int, *, rank: int | None = None, terms: int = 2, **common: Any):
        side = min(in_features, out_features)
        at_least(1, rank=rank, terms=terms)
        self.rank = min(side, -(-side // 4) if rank is None else rank)
        self.terms = terms
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        n, m = self.in_features, self.out_features
        return {
            "left": Factor((self.terms, n), fan_in=n),
            "right": Factor((self.terms, m), fan_in=self.terms),
            "down": Factor((self.rank, n), fan_in=n),
            "up": Factor((self.rank, m), fan_in=self.rank),
        }

    def draw(self, key: jax.Array, name: str, factor: Factor) -> jax.Array:
        ones = self.ones()
        return ones[name].astype(self.param_dtype) if name in ones else super().draw(key, name, factor)

    def ones(self) -> dict[str, jax.Array]:
        """Factors of the denominator 1, whose terms can all be trained."""
        n, m = self.in_features, self.out_features
        term = jnp.arange(self.terms)[:, None]
        return {
            "left": jnp.cos(math.pi / n * term * (jnp.arange(n) + 0.5)),
            "right": jnp.broadcast_to((term == 0).astype(jnp.float32), (self.terms, m)),
        }

    def weights(self, dtype: jnp.dtype) -> dict[str, jax.Array]:
        wide = jnp.promote_types(self.param_dtype, jnp.float32)
        left, right, down, up = super().weights(wide).values()
        return {"kernel": (down.T @ up / jnp.maximum(left.T @ right, LEAST)).astype(dtype)}

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        u, s, v = svd(kernel)
        root = jnp.sqrt(s[: self.rank])
        down, up = root[:, None] * u[:, : self.rank].T, root[:, None] * v[: self.rank]
        return self.ones() | {"down": down, "up": up}
