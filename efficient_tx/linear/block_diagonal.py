"""BlockDiagonal: W = P diag(B_1, ..., B_k): blocks after a fixed channel shuffle P of the input.

The published code of Monarch (Dao et al. 2022, arXiv 2204.00595) trains this layer in BERT's MLPs. The shuffle is that
of ShuffleNet (Zhang et al. 2017, arXiv 1707.01083). Without it, stacked layers never mix their blocks.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.checks import at_least
from efficient_tx.linear.structured import Factor, Structured, in_chunks, pad


class BlockDiagonal(Structured):
    """y[k, q] = Σ_p x[p, k] weight[k, q, p], k fastest in x and q fastest in y: 1/blocks of the dense parameters.

    Sizes that are no multiples of `blocks` are padded. The projection of a dense weight keeps the entries in the
    blocks.

    Args:
      blocks: number of blocks, at most the smaller side.
      shuffle: whether block k reads the channels k, k + blocks, k + 2·blocks, ..., else neighbouring channels.
    """

    paper = "Dao et al. 2022, arXiv 2204.00595; Zhang et al. 2017, arXiv 1707.01083"
    computes = "P diag(B₁, …, B_k), P a channel shuffle"
    size = "n²/blocks"
    nearest = "its entries"

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[int]]:
        return "blocks", range(min(n, m), 0, -1)

    def __init__(self, in_features: int, out_features: int, *, blocks: int = 4, shuffle: bool = True, **common: Any):
        at_least(1, blocks=blocks)
        self.blocks = min(blocks, in_features, out_features)
        self.shuffle = shuffle
        self.in_block = -(-in_features // self.blocks)
        self.out_block = -(-out_features // self.blocks)
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        shape = (self.blocks, self.out_block, self.in_block)
        return {"weight": Factor(shape, fan_in=self.in_features / self.blocks)}

    def read(self, x: jax.Array) -> jax.Array:
        """The input channels of each block, from x `[..., in_features]`, padded: `[blocks, ..., in_block]`."""
        x = pad(x, self.blocks * self.in_block)
        if self.shuffle:
            return jnp.moveaxis(x.reshape(*x.shape[:-1], self.in_block, self.blocks), -1, 0)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], self.blocks, self.in_block), -2, 0)

    def multiply(self, x: jax.Array, *, weight: jax.Array) -> jax.Array:
        def product(x, weight):
            # Block axis first: plain products per block, with all permutations outside of them.
            out = jnp.moveaxis(jnp.einsum("k...p,kqp->k...q", self.read(x), weight), 0, -2)
            return out.reshape(*x.shape[:-1], -1)[..., : self.out_features]

        return in_chunks(product, x, weight)

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        read = jnp.pad(self.read(kernel.T), [(0, 0), (0, self.blocks * self.out_block - self.out_features), (0, 0)])
        blocks = jnp.arange(self.blocks)
        return {"weight": read.reshape(self.blocks, self.blocks, self.out_block, self.in_block)[blocks, blocks]}
