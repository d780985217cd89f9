"""Sigmoid attention (Ramapuram et al. 2024, arXiv 2409.04431): independent weights per key, not normalised.

    out_i = Σ_j σ(q_i·k_j / √K + b) v_j        σ(x) = 1 / (1 + exp(−x)), b = −ln(max_len)

With b = −ln(trained length), the weights of a query sum to about the same number at any length, as in softmax
attention. b is one constant in training and evaluation: shorter examples are not rescaled. Cost n².

Unlike the published kernel: weights far below 1 keep their relative accuracy; there σ is (1 + tanh(x/2)) / 2.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.checks import OptionError
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask_or_pairs


def sigmoid(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    bias: float, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Sums values with sigmoid weights, blockwise: memory is linear in the length, forward and backward.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      bias: added to every logit; −ln(n) for a model with sequences of up to n tokens.
      mask: key mask, bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; or a mask of all pairs,
        `[batch, heads or 1, queries, keys]`, with memory quadratic in the length.
      key: unused, nothing is drawn.
      causal: query i sees keys j ≤ i + keys − queries only.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. The arithmetic is float32 at
      least.
    """
    check_shapes(q, k, v)
    return flash_attention(q, k, v, score="sigmoid", bias=bias, mask=key_mask_or_pairs(mask, q, k), causal=causal)


class Sigmoid(MultiHead):
    """Multi-head sigmoid attention with the bias −ln(max_len).

    Args:
      qk_norm: LayerNorm of queries and keys over the channels of each head, before rotary positions; the heads share
        its parameters.
      layer_scale: initial value of a learnt factor for each output channel; None means no factor. This is LayerScale
        (Touvron et al. 2021, arXiv 2103.17239); the paper uses 1e-4.

    Raises:
      ValueError: no `max_len`; `layer_scale` is not above 0.
    """

    paper = "Ramapuram et al. 2024, arXiv 2409.04431"
    computes = "sigmoid weights with a bias of −ln(max_len), unnormalised"
    cost = "n²"
    function = staticmethod(sigmoid)
    needs_max_len = True

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"bias": -math.log(q.shape[1])}

    def __init__(
        self, features: int, *,
        qk_norm: bool = False, layer_scale: float | None = None, dtype: jnp.dtype | None = None, rngs: nnx.Rngs,
        **common: Any,
    ):  # fmt: skip
        super().__init__(features, dtype=dtype, rngs=rngs, **common)
        if layer_scale is not None and not layer_scale > 0:
            raise OptionError("layer_scale", layer_scale, "it must be None or above 0, as 1e-4")
        if qk_norm:
            self.q, self.k = (HeadNorm(layer, self.head_dim, dtype=dtype, rngs=rngs) for layer in (self.q, self.k))
        self.layer_scale = None if layer_scale is None else nnx.Param(jnp.full(features, layer_scale, jnp.float32))

    def finish(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        out = super().finish(heads, tokens)
        return out if self.layer_scale is None else out * self.layer_scale[...].astype(out.dtype)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:  # fmt: skip
        return super().attend(q, k, v, mask=mask, key=key, bias=-math.log(self.max_len))


class HeadNorm(nnx.Module):
    """A projection and a LayerNorm over the channels of each of its heads."""

    def __init__(self, layer: nnx.Module, head_dim: int, *, dtype: jnp.dtype | None, rngs: nnx.Rngs):
        self.layer = layer
        self.norm = nnx.LayerNorm(head_dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[tokens, features]` -> `[tokens, heads · head_dim]`."""
        out = self.layer(x)
        return self.norm(out.reshape(len(out), -1, self.norm.num_features)).reshape(out.shape)
