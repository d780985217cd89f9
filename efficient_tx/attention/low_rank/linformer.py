"""Linformer: attention to learnt mixtures of the positions (Wang et al. 2020, arXiv 2006.04768).

    out = softmax(Q (E K)ᵀ / √d) (F V),        E, F [rank, max_len] learnt

Cost n·rank·d. E and F are tied to positions, so max_len is required. Not causal, because E mixes all positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.checks import at_least
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import compact, key_mask

HIGHEST = jax.lax.Precision.HIGHEST


def linformer(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    e: jax.Array,
    f: jax.Array,
    mask: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """Linformer attention.

    Args:
      q: `[batch, q_length, heads, head_dim]`.
      k: `[batch, length, groups, head_dim]`; groups divides heads.
      v: `[batch, length, groups, v_dim]`.
      e: weights of the keys' positions, `[rank, max_len]`, max_len ≥ length.
      f: weights of the values' positions, `[rank, max_len]`.
      mask: bool `[batch, length]` or `[batch, 1, 1, length]`, True for real tokens. Padding is removed first: column i
        of E and F belongs to the real token of rank i.
      key: unused, nothing is drawn.

    Returns:
      `[batch, q_length, heads, v_dim]`; zero without any key. The softmax is float32 at least.

    Raises:
      ValueError: more tokens than max_len, or heads is no multiple of groups.
    """
    check_shapes(q, k, v)
    del key
    batch, length = k.shape[:2]
    if length > e.shape[1] or length > f.shape[1]:
        raise ValueError(f"length is {length}, but linformer was built for max_len={min(e.shape[1], f.shape[1])}")
    mask = key_mask(mask, batch, length)
    keys = jnp.einsum("rl,blgd->brgd", e[:, :length].astype(k.dtype), compact(k, mask), precision=HIGHEST)
    values = jnp.einsum("rl,blgd->brgd", f[:, :length].astype(v.dtype), compact(v, mask), precision=HIGHEST)
    return flash_attention(q, keys, values)


class Linformer(MultiHead):
    """Multi-head Linformer; all heads share E and F.

    Args:
      rank: rows of E and F: number of mixed positions that a query attends to.
    """

    paper = "Wang et al. 2020, arXiv 2006.04768"
    computes = "attention over m learnt mixtures of positions"
    cost = "n·m"
    function = staticmethod(linformer)
    needs_max_len = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"rank": budget}

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        length = q.shape[1]
        return {name: (rng.normal(size=(budget, length)) / length**0.5).astype(np.float32) for name in ("e", "f")}

    def __init__(self, features: int, *, rank: int = 128, rngs: nnx.Rngs, **common: Any):
        super().__init__(features, rngs=rngs, **common)
        at_least(1, rank=rank)
        # With this variance of E and F, a mixture of max_len keys has the variance of one key.
        init = nnx.initializers.normal(self.max_len**-0.5)
        self.e = nnx.Param(init(rngs.params(), (rank, self.max_len), jnp.float32))
        self.f = nnx.Param(init(rngs.params(), (rank, self.max_len), jnp.float32))

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:  # fmt: skip
        return super().attend(q, k, v, mask=mask, key=key, e=self.e[...], f=self.f[...])

    def state_numbers(self, length: int) -> int:
        return 2 * self.e.shape[0] * self.heads * self.head_dim
