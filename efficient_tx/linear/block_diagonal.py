"""BlockDiagonal: W = P diag(B_1, ..., B_k): blocks after a fixed channel shuffle P of the input.

The published code of Monarch (Dao et al. 2022, arXiv 2204.00595) trains this layer in BERT's MLPs. The shuffle is that
of ShuffleNet (Zhang et al. 2017, arXiv 1707.01083) and of that code: of the channels in `blocks` groups, the first of
every group come first, then the second ones, and so on. Without it, stacked layers never mix their blocks.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from efficient_tx.checks import at_least, one_of
from efficient_tx.linear.structured import Factor, Structured, growing, in_chunks, pad

ORDERS = ("shufflenet", "inverse")


class BlockDiagonal(Structured):
    """y[k, q] = Σ_p (P x)[k, p] weight[k, q, p], p and q fastest: 1/blocks of the dense parameters.

    Sizes that are no multiples of `blocks` are padded. The projection of a dense weight keeps the entries in the
    blocks.

    Args:
      blocks: number of blocks, at most the smaller side.
      shuffle: whether the channels are shuffled, else block k reads neighbouring channels.
      order: order of the shuffle. "shufflenet": block k reads the k-th part of each of `blocks` groups of neighbouring
        channels. "inverse", the inverse permutation: block k reads the channels k, k + blocks, k + 2·blocks, ...; the
        same if `blocks` is the root of the padded input's width.
    """

    paper = "Dao et al. 2022, arXiv 2204.00595; Zhang et al. 2017, arXiv 1707.01083"
    computes = "P diag(B₁, …, B_k), P a channel shuffle"
    size = "n²/blocks"
    nearest = "its entries"
    formerly: ClassVar = {"order": "inverse"}

    @staticmethod
    def sized_by(n: int, m: int) -> tuple[str, Sequence[int]]:
        return "blocks", growing(range(min(n, m), 0, -1), lambda blocks: blocks * -(-n // blocks) * -(-m // blocks))

    def __init__(
        self, in_features: int, out_features: int, *,
        blocks: int = 4, shuffle: bool = True, order: str = "shufflenet", **common: Any,
    ):  # fmt: skip
        at_least(1, blocks=blocks)
        one_of(ORDERS, order=order)
        self.blocks = min(blocks, in_features, out_features)
        self.shuffle, self.order = shuffle, order
        self.in_block = -(-in_features // self.blocks)
        self.out_block = -(-out_features // self.blocks)
        super().__init__(in_features, out_features, **common)

    def factors(self) -> dict[str, Factor]:
        shape = (self.blocks, self.out_block, self.in_block)
        return {"weight": Factor(shape, fan_in=self.in_features / self.blocks)}

    def read(self, x: jax.Array) -> jax.Array:
        """The input channels of each block, from x `[..., in_features]`, padded: `[blocks, ..., in_block]`."""
        x = pad(x, self.blocks * self.in_block)
        if self.shuffle and self.order == "inverse":
            return jnp.moveaxis(x.reshape(*x.shape[:-1], self.in_block, self.blocks), -1, 0)
        if self.shuffle:
            x = x.reshape(*x.shape[:-1], self.blocks, self.in_block).swapaxes(-1, -2).reshape(x.shape)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], self.blocks, self.in_block), -2, 0)

    def multiply(self, x: jax.Array, *, weight: jax.Array) -> jax.Array:
        def product(x, weight):
            # Block axis first: plain products per block, with all permutations outside of them.
            out = jnp.moveaxis(jnp.einsum("k...p,kqp->k...q", self.read(x), weight), 0, -2)
            return out.reshape(*x.shape[:-1], self.blocks * self.out_block)[..., : self.out_features]

        return in_chunks(product, x, weight)

    def fit(self, kernel: jax.Array) -> dict[str, jax.Array]:
        read = jnp.pad(self.read(kernel.T), [(0, 0), (0, self.blocks * self.out_block - self.out_features), (0, 0)])
        blocks = jnp.arange(self.blocks)
        return {"weight": read.reshape(self.blocks, self.blocks, self.out_block, self.in_block)[blocks, blocks]}
