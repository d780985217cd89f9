"""Kernelized attention (Chen et al. 2021, Skyformer, arXiv 2111.00035): out_i = Σ_j exp(−‖q_i − k_j‖² / (2√K)) v_j.

A Gaussian kernel instead of the softmax, without normalisation over the keys: the weights of a query do not sum to 1.
"""

import jax

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask_or_pairs


def kernelized(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Sums values with weights of a Gaussian kernel, blockwise: memory is linear in the length, forward and backward.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: key mask, bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; or a mask of all pairs,
        `[batch, heads or 1, queries, keys]`, with memory quadratic in the length.
      key: unused, nothing is drawn.
      causal: query i sees keys j ≤ i + keys − queries only.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys.
    """
    check_shapes(q, k, v)
    return flash_attention(q, k, v, score="gaussian", mask=key_mask_or_pairs(mask, q, k), causal=causal)


class Kernelized(MultiHead):
    """Multi-head Gaussian-kernel attention; arguments as in `MultiHead`."""

    paper = "Chen et al. 2021, arXiv 2111.00035"
    computes = "a Gaussian kernel in place of the softmax, exactly"
    cost = "n²"
    function = staticmethod(kernelized)
