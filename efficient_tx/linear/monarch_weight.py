"""Monarch: W = two block-diagonal matrices with a fixed permutation between them (Dao et al. 2022, arXiv 2204.00595).

The input is split into `k` blocks of p channels and the output into `l` groups of s channels (output channel (s, l), l
fastest). The weight between input block k and output group l is a p × s slice of rank q/l, and every slice has its own
factors:

    hidden[k, q] = Σ_p x[k, p] w1[k, q, p],   hidden read as [r, l], l fastest,
    y[s, l] = Σ_r hidden[r, l] w2[l, s, r]

So the best approximation of a dense weight is a truncated singular value decomposition of each slice, in closed form.
The product is `efficient_tx.kernels.monarch`, which has no forward-mode differentiation for large inputs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.checks import OptionError, at_least
from efficient_tx.kernels.monarch import monarch
from efficient_tx.linear.structured import Factor, Structured, growing, pad
from efficient_tx.numerics.factorisations import svd


def nearest_slices(kernel: jax.Array, k: int, p: int, s: int, l: int, rank: int) -> tuple[jax.Array, jax.Array]:
    """The factors of the nearest Monarch matrix: a truncated SVD of each slice, of a rank up to min(p, s).

    Args:
      kernel: `[in, out]` with in ≤ k·p and out ≤ s·l, padded here. The padding is whole rows and columns of a slice, so
        it does not change the optimum.
      k, p: number and width of the input blocks.
      s, l: width and number of the output groups.
      rank: rank of each slice.

    Returns:
      w1 `[k, rank·l, p]` and w2 `[l, s, k·rank]`.
    """
    padded = jnp.pad(kernel, [(0, k * p - kernel.shape[0]), (0, s * l - kernel.shape[1])])
    slices = padded.reshape(k, p, s, l).transpose(0, 3, 1, 2)
    u, singular, v = svd(slices)
    root = jnp.sqrt(singular[..., :rank])
    w1 = jnp.einsum("klpc,klc->kclp", u[..., :rank], root)
    w2 = jnp.einsum("klcs,klc->lskc", v[..., :rank, :], root)
    return w1.reshape(k, -1, p), w2.reshape(l, s, -1)


class Monarch(Structured):
    """A linear layer with a Monarch weight of any size; input and output are padded to whole blocks inside.

    The inner block size q is the smaller of the two outer ones, rounded up to a multiple of `blocks`, so that all
    slices have the same rank q/blocks. With 4 blocks a square weight has half of the dense parameters, with √n blocks
    2n√n. With more than √n blocks the number of parameters grows again, because the rank-1 slices are small.

    Args:
      blocks: number of blocks of each factor.
      init: initialisation of the factors: "variance" preserves the variance of the input; "published" draws each factor
        uniformly in ±1/√(width of its blocks), as the authors' code does, which gives 1/9 of the variance.

    Raises:
      ValueError: `blocks` below 1, or an unknown `init`.
    """

    paper = "Dao et al. 2022, arXiv 2204.00595"
    computes = "diag(B₁, …, B_k) P diag(C₁, …, C_k) P"
    size = "n²/2 with 4 blocks, 2·n·√n with √n"
    nearest = "singular value decomposition of every slice"

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[int]]:
        def size(blocks):
            p, s = -(-n // blocks), -(-m // blocks)
            return blocks * blocks * -(-min(p, s) // blocks) * (p + s)

        return "blocks", growing(range(math.isqrt(min(n, m)), 0, -1), size)

    @staticmethod
    def timed_with(n: int) -> Sequence[Mapping[str, Any]]:
        return ({"blocks": 4}, {"blocks": 32})

    def __init__(self, in_features: int, out_features: int, *, blocks: int = 4, init: str = "variance", **common: Any):
        at_least(1, blocks=blocks)
        if init not in ("variance", "published"):
            raise OptionError("init", init, "choose 'variance' or 'published'")
        self.blocks = blocks
        self.init = init
        self.in_block = -(-in_features // blocks)
        self.out_block = -(-out_features // blocks)
        self.slice_rank = -(-min(self.in_block, self.out_block) // blocks)
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        inner = self.slice_rank * self.blocks
        # Padding gives zeros to the last block; dividing by the real width keeps the mean output variance at 1.
        return {
            "w1": Factor((self.blocks, inner, self.in_block), fan_in=self.in_features / self.blocks),
            "w2": Factor((self.blocks, self.out_block, inner), fan_in=inner),
        }

    def draw(self, key: jax.Array, name: str, factor: Factor) -> jax.Array:
        if self.init == "variance":
            return super().draw(key, name, factor)
        bound = factor.shape[-1] ** -0.5
        return jax.random.uniform(key, factor.shape, self.param_dtype, -bound, bound)

    def multiply(self, x: jax.Array, *, w1: jax.Array, w2: jax.Array) -> jax.Array:
        return monarch(pad(x, self.blocks * self.in_block), w1, w2)[..., : self.out_features]

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        w1, w2 = nearest_slices(kernel, self.blocks, self.in_block, self.out_block, self.blocks, self.slice_rank)
        return {"w1": w1, "w2": w2}
