"""Monarch: W = two block-diagonal matrices with a fixed permutation between them (Dao et al. 2022, arXiv 2204.00595).

Cut the input into `k` blocks of p and the output into `l` groups of s (output channel (s, l), l fastest). The weight
between input block k and output group l is then a p × s slice of rank q/l, and every slice has factors of its own:

    hidden[k, q] = Σ_p x[k, p] w1[k, q, p],   hidden read as [r, l], l fastest,
    y[s, l] = Σ_r hidden[r, l] w2[l, s, r]

So the best approximation of a dense weight is a truncated singular value decomposition of each slice, in closed form.
"""

import jax
import jax.numpy as jnp

from efficient_tx.linear.structured import Factor, Structured


def monarch(x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """x times the Monarch matrix of the factors w1 and w2.

    Args:
      x: `[..., k·p]`.
      w1: `[k, q, p]`, one q × p block per input block.
      w2: `[l, s, r]` with l·r = k·q, one s × r block per output group.

    Returns:
      `[..., s·l]`, l fastest, in the promoted dtype.
    """
    k, _, p = w1.shape
    l, s, r = w2.shape
    batch = x.shape[:-1]
    hidden = jnp.einsum("...kp,kqp->...kq", x.reshape(*batch, k, p), w1)
    out = jnp.einsum("...rl,lsr->...sl", hidden.reshape(*batch, r, l), w2)
    return out.reshape(*batch, s * l)


class Monarch(Structured):
    """A linear layer with a Monarch weight of any size; it pads its input and cuts its output to whole blocks.

    The inner block size q is the smaller of the two outer ones, rounded up to a multiple of `blocks` so that all
    slices have the same rank q/blocks. With 4 blocks a square weight has half of the dense parameters, with √n blocks
    2n√n; more blocks than √n make rank-1 slices so small that parameters grow again.

    Args:
      blocks: number of blocks of each factor.
    """

    def __init__(self, in_features: int, out_features: int, *, blocks: int = 4, **common):
        if blocks < 1:
            raise ValueError(f"blocks is {blocks}: it must be at least 1")
        self.blocks = blocks
        self.in_block = -(-in_features // blocks)
        self.out_block = -(-out_features // blocks)
        self.slice_rank = -(-min(self.in_block, self.out_block) // blocks)
        super().__init__(in_features, out_features, **common)

    def factors(self):
        inner = self.slice_rank * self.blocks
        # The padding feeds zeros into the last block: dividing by the real width keeps the mean output variance at 1.
        return {
            "w1": Factor((self.blocks, inner, self.in_block), fan_in=self.in_features / self.blocks),
            "w2": Factor((self.blocks, self.out_block, inner), fan_in=inner),
        }

    def multiply(self, x, *, w1, w2):
        padding = self.blocks * self.in_block - self.in_features
        if padding:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        return monarch(x, w1, w2)[..., : self.out_features]

    def fit(self, kernel):
        k = l = self.blocks
        padded = jnp.pad(
            kernel, [(0, k * self.in_block - self.in_features), (0, l * self.out_block - self.out_features)]
        )
        # A slice is the p × s weight between input block k and output group l.
        slices = padded.reshape(k, self.in_block, self.out_block, l).transpose(0, 3, 1, 2)
        u, singular, v = jnp.linalg.svd(slices, full_matrices=False)
        rank = min(self.slice_rank, singular.shape[-1])
        root = jnp.sqrt(singular[..., :rank])
        left = jnp.einsum("klpc,klc->kclp", u[..., :rank], root)
        right = jnp.einsum("klcs,klc->lskc", v[..., :rank, :], root)
        return {
            "w1": left.reshape(k, rank * l, self.in_block),
            "w2": right.reshape(l, self.out_block, k * rank),
        }
