"""Exact softmax attention (Vaswani et al. 2017, arXiv 1706.03762): out_i = Σ_j softmax_j(q_i·k_j / √K) v_j."""

import jax

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask_or_pairs


def softmax(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Exact softmax attention, blockwise: memory is linear in the length, forward and backward.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: key mask, bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; or a mask of all pairs,
        `[batch, heads or 1, queries, keys]`, with memory quadratic in the length.
      key: unused, nothing is drawn.
      causal: query i sees keys j ≤ i + keys − queries only.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. Statistics are float32 at
      least.
    """
    check_shapes(q, k, v)
    return flash_attention(q, k, v, mask=key_mask_or_pairs(mask, q, k), causal=causal)


class Softmax(MultiHead):
    """Multi-head softmax attention; arguments as in `MultiHead`."""

    paper = "Vaswani et al. 2017, arXiv 1706.03762"
    computes = "exact attention, blockwise: memory linear in n"
    cost = "n²"
    function = staticmethod(softmax)
