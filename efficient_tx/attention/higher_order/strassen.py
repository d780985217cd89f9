"""Strassen attention (Kozachinskiy et al. 2025, arXiv 2501.19215): attention to pairs with three bilinear scores.

    out_i = Σ_jk softmax_jk(s_ijk) v_j ⊙ v2_k,        s_ijk = (f_i·g_j + g_j·h_k + h_k·f_i) / √K

Here f is q, g is k and h is k2. All three terms are divided by √K; lucidrains/strassen-attention scales only f, so g·h
is not scaled. With X = e^{fgᵀ/√K}, Y = e^{ghᵀ/√K}, Z = e^{fhᵀ/√K} the sums are matrix products,

    Σ_jk e^{s_ijk} v_jc v2_kc = Σ_k (X diag(v_c) Y)_ik Z_ik v2_kc,

with time n^ω·V for V value channels and fast matrix multiplication (Strassen 1969), else n³·V. This form is not used
here: X and Y must be scaled by their largest entries separately, and then their product can underflow. Instead, with
s_ijk = ((f_i + h_k)·g_j + h_k·f_i) / √K, the sums are streamed relative to the largest score, in time n³·(K + V).
"""

import jax

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.kernels import pair_attention


def strassen(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    k2: jax.Array, v2: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Exact attention to all pairs of tokens: time is cubic in the length, memory linear.

    Args:
      q: `[batch, queries, heads, head_dim]`, f in the formula.
      k: `[batch, keys, groups, head_dim]`, g in the formula; groups divides heads.
      v: `[batch, keys, groups, v_dim]`, values of the first token of a pair.
      k2: same shape as k, h in the formula.
      v2: same shape as v, values of the second token of a pair.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: unused, nothing is drawn.
      causal: token i sees tokens j, k ≤ i only; the last query is at the last real token.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at masked queries and for a query without keys.
      Arithmetic is float32 at least.

    Raises:
      ValueError: shapes that do not fit.
    """
    del key
    return pair_attention(q, k, v, k2, v2, pair=bilinear, mask=mask, causal=causal)


def bilinear(q, k2):
    """The factor of k_j in the score, (q_i + k2_k) / √K, and the rest of the score, q_i·k2_k / √K."""
    scale = q.shape[-1] ** -0.5
    return (q + k2) * scale, (q * k2).sum(-1) * scale


class Strassen(MultiHead):
    """Multi-head Strassen attention; arguments as in `MultiHead`. With rotary positions its scores are relative."""

    paper = "Kozachinskiy et al. 2025, arXiv 2501.19215"
    computes = "softmax over all pairs of tokens, scores of three inner products"
    cost = "n³"
    function = staticmethod(strassen)
    projections = ("q", "k", "v", "k2", "v2")
    rotated = ("q", "k", "k2")
    one_by_one = "on TPUs XLA adds to the second tokens of one head after another"
