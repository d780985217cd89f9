"""Kronecker: W = Σ_t A_t ⊗ B_t, a sum of `rank` Kronecker products.

The nearest sum to a matrix is a truncated singular value decomposition of its rearrangement, in which each block of W
is a row (Van Loan and Pitsianis 1993, Approximation with Kronecker products).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.checks import at_least
from efficient_tx.linear.structured import Factor, Structured, in_chunks
from efficient_tx.numerics.factorisations import svd


def divide(size: int) -> tuple[int, int]:
    """(a, b) with a·b = size and a ≤ b, as close to each other as possible; (1, size) for a prime."""
    few = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
    return few, size // few


class Kronecker(Structured):
    """y[c, d] = Σ_t Σ_ab x[a, b] left[t, a, c] right[t, b, d], with a·b = in_features and c·d = out_features.

    There is no padding, because then the projection would have no closed form. So a prime side is not divided, and with
    two prime sides W is dense. With one term and integer √n, a square layer of n features has 2n parameters and 2n^1.5
    multiplications: far fewer than any other structure, and it is by far the least expressive one.

    Args:
      rank: number of terms, at most the number with which every matrix can be written.
    """

    paper = "Van Loan and Pitsianis 1993"
    computes = "Σ_t A_t ⊗ B_t"
    size = "2·n·terms"
    nearest = "singular value decomposition of a rearrangement"

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[int]]:
        return "rank", range(1, min(n, m) + 1)

    def __init__(self, in_features: int, out_features: int, *, rank: int = 1, **common: Any):
        at_least(1, rank=rank)
        self.a, self.b = divide(in_features)
        self.c, self.d = divide(out_features)
        self.rank = min(rank, self.a * self.c, self.b * self.d)
        super().__init__(in_features, out_features, **common)

    @property
    def right_first(self) -> bool:
        """Whether right factors first needs no more multiplications than left factors first."""
        return self.in_features * self.d + self.out_features * self.a <= (
            self.in_features * self.c + self.out_features * self.b
        )

    @property
    def multiplies(self) -> int:
        return min(self.multiplies_by_terms, self.in_features * self.out_features)

    @property
    def multiplies_by_terms(self) -> int:
        """As `multiplies`, where W is not formed, which pays for many vectors and many terms."""
        first, second = (self.d, self.a) if self.right_first else (self.c, self.b)
        return self.rank * (self.in_features * first + self.out_features * second)

    def factors(self) -> dict[str, Factor]:
        # The second product also sums over the terms.
        left, right = (self.rank, 1) if self.right_first else (1, self.rank)
        return {
            "left": Factor((self.rank, self.a, self.c), fan_in=left * self.a),
            "right": Factor((self.rank, self.b, self.d), fan_in=right * self.b),
        }

    def multiply(self, x: jax.Array, *, left: jax.Array, right: jax.Array) -> jax.Array:
        dense, tokens = self.in_features * self.out_features, math.prod(x.shape[:-1])
        if tokens * self.multiplies_by_terms > (tokens + self.rank) * dense:
            return x @ jnp.einsum("tac,tbd->abcd", left, right).reshape(self.in_features, self.out_features)

        def product(x, left, right):
            grid = x.reshape(*x.shape[:-1], self.a, self.b)
            if self.right_first:
                out = jnp.einsum("...atd,tac->...cd", jnp.einsum("...ab,tbd->...atd", grid, right), left)
            else:
                out = jnp.einsum("...btc,tbd->...cd", jnp.einsum("...ab,tac->...btc", grid, left), right)
            return out.reshape(*x.shape[:-1], self.out_features)

        return in_chunks(product, x, left, right)

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        blocks = kernel.reshape(self.a, self.b, self.c, self.d).transpose(0, 2, 1, 3)
        u, s, v = svd(blocks.reshape(self.a * self.c, self.b * self.d))
        root = jnp.sqrt(s[: self.rank])
        return {
            "left": (u[:, : self.rank] * root).T.reshape(self.rank, self.a, self.c),
            "right": (v[: self.rank] * root[:, None]).reshape(self.rank, self.b, self.d),
        }
