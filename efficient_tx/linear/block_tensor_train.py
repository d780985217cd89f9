"""BlockTensorTrain: two tensor-train cores with a block index in each (Qiu et al. 2024, arXiv 2406.06248).

The input is split into m₂ blocks of m₁ channels, the output into n₁ groups of n₂ channels. Every m₁ × n₂ slice of the
weight has rank ρ. This is the Monarch product with about √n blocks and a free rank:

    hidden[m₂, ρ, n₁] = Σ x[m₂, m₁] w1[m₂, (ρ, n₁), m₁],   y[n₂, n₁] = Σ hidden[m₂, ρ, n₁] w2[n₁, n₂, (m₂, ρ)]

Monarch with √n blocks is the case ρ = 1. The best approximation is again the truncated SVD of every slice.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

from efficient_tx.checks import at_least
from efficient_tx.linear.monarch_weight import monarch, nearest_slices
from efficient_tx.linear.structured import Factor, Structured, pad


def split(size: int) -> tuple[int, int]:
    """(a, b) with a·b ≥ size and √size / 2 ≤ a ≤ √size, with the least padding and, among these, the most even."""
    root = math.isqrt(size)
    candidates = range((root + 1) // 2, root + 1)
    few = min(candidates, key=lambda a: (-size % a, -a))
    return few, -(-size // few)


class BlockTensorTrain(Structured):
    """A linear layer of any size with a block tensor-train weight of two cores; padding fills the last blocks.

    A square layer has 2·rank·n^1.5 parameters. Both sides are split as evenly as possible with little padding.

    Args:
      rank: rank of each slice, at most its smaller side; None is the largest rank up to 4 with at most half of the
        dense parameters. This is a quarter of them at 512 features, an eighth at 2048.
    """

    paper = "Qiu et al. 2024, arXiv 2406.06248"
    computes = "√n × √n slices of a free rank"
    size = "2·rank·n^1.5"
    nearest = "singular value decomposition of every slice"

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[int]]:
        return "rank", range(1, min(n, m) + 1)

    def __init__(self, in_features: int, out_features: int, *, rank: int | None = None, **common: Any):
        at_least(1, rank=rank)
        self.in_blocks, self.in_block = split(in_features)
        self.out_groups, self.out_group = split(out_features)
        if rank is None:
            of_rank_one = self.in_blocks * self.out_groups * (self.in_block + self.out_group)
            rank = max(1, min(4, in_features * out_features // (2 * of_rank_one)))
        self.rank = min(rank, self.in_block, self.out_group)
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        k, l, rank = self.in_blocks, self.out_groups, self.rank
        return {
            # The real width of a block, without padding, as in Monarch.
            "w1": Factor((k, rank * l, self.in_block), fan_in=self.in_features / k),
            "w2": Factor((l, self.out_group, k * rank), fan_in=k * rank),
        }

    def multiply(self, x: jax.Array, *, w1: jax.Array, w2: jax.Array) -> jax.Array:
        return monarch(pad(x, self.in_blocks * self.in_block), w1, w2)[..., : self.out_features]

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        shape = self.in_blocks, self.in_block, self.out_group, self.out_groups
        w1, w2 = nearest_slices(kernel, *shape, self.rank)
        return {"w1": w1, "w2": w2}
