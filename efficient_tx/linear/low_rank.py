"""LowRank: W = D U, two dense layers with a narrow width between them.

The best approximation of a given rank is the truncated singular value decomposition (Eckart and Young 1936).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.checks import at_least
from efficient_tx.linear.structured import Factor, Structured
from efficient_tx.numerics.factorisations import svd


class LowRank(Structured):
    """y = x D U, stored as Dᵀ `[rank, in_features]` and U `[rank, out_features]`.

    D is stored transposed, because XLA's CPU backend computes a wide gradient a third faster than a tall one.

    Args:
      rank: rank of the weight, at most the smaller side; None is a quarter of the smaller side, which gives half the
        parameters of a square dense layer.
    """

    paper = "Eckart and Young 1936"
    computes = "D U"
    size = "2·n·rank"
    nearest = "singular value decomposition"

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[int]]:
        return "rank", range(1, min(n, m) + 1)

    @staticmethod
    def timed_with(n: int) -> Sequence[Mapping[str, Any]]:
        return ({"rank": max(1, n // 8)},)

    def __init__(self, in_features: int, out_features: int, *, rank: int | None = None, **common: Any):
        side = min(in_features, out_features)
        at_least(1, rank=rank)
        self.rank = min(side, -(-side // 4) if rank is None else rank)
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        return {
            "down": Factor((self.rank, self.in_features), fan_in=self.in_features),
            "up": Factor((self.rank, self.out_features), fan_in=self.rank),
        }

    def multiply(self, x: jax.Array, *, down: jax.Array, up: jax.Array) -> jax.Array:
        return x @ down.T @ up

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        u, s, v = svd(kernel)
        root = jnp.sqrt(s[: self.rank])
        return {"down": root[:, None] * u[:, : self.rank].T, "up": root[:, None] * v[: self.rank]}
