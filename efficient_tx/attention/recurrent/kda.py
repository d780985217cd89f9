"""Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692): `gated_delta` with a decay for each channel of the keys.

    S = diag(exp g_t) S_{t−1},    S_t = S + β_t k_tᵀ (v_t − k_t S),    o_t = q_t S_t / √d_k
    g_t = −exp(a_h) softplus(W₂ W₁ x_t + b),    y_t = W_o [RMSNorm(o_t) ⊙ σ(V₂ V₁ x_t + c)]

W₁ and V₁ have the rank of a head's width. The default sizes and initial decays are those of flash-linear-attention's
layer: values as wide as keys, exp(a) uniform in [1, 16], softplus(b) log-uniform in [0.001, 0.1].
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.recurrent.base import log_time_steps
from efficient_tx.attention.recurrent.delta import Delta
from efficient_tx.attention.recurrent.gated_delta import gated_delta, log_decays


def kda(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    beta: jax.Array, log_decay: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:  # fmt: skip
    """`gated_delta` with log_decay `[batch, keys, heads, head_dim]`; other arguments, returns and errors as there."""
    if log_decay.ndim != 4:
        raise ValueError(f"log_decay has shape {log_decay.shape}: pass [batch, keys, heads, head_dim]")
    return gated_delta(q, k, v, beta=beta, log_decay=log_decay, mask=mask, key=key, causal=causal)


class KDA(Delta):
    """The whole layer of Kimi Delta Attention; arguments as in `Delta`."""

    paper = "Kimi Team 2025, arXiv 2510.26692"
    computes = "as `delta`, after a decay per channel and token"
    function = staticmethod(kda)

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        decays = (-np.abs(rng.normal(size=q.shape)) / 16).astype(np.float32)
        return Delta.measured_with(q, budget, rng) | {"log_decay": decays}

    def __init__(
        self, features: int, *, linear: Callable = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs,
        **common: Any,
    ):  # fmt: skip
        super().__init__(features, linear=linear, dtype=dtype, rngs=rngs, **common)
        keys, values, rank = self.heads * self.key_dim, self.heads * self.head_dim, self.head_dim
        self.decay_down, self.gate_down = (
            nnx.Linear(features, rank, use_bias=False, dtype=dtype, rngs=rngs) for _ in range(2)
        )
        self.decay_up = nnx.Linear(rank, keys, use_bias=False, dtype=dtype, rngs=rngs)
        self.gate_up = nnx.Linear(rank, values, dtype=dtype, rngs=rngs)
        self.decay_rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (self.heads, 1), jnp.float32, 1, 16)))
        self.decay_bias = nnx.Param(log_time_steps((self.heads, self.key_dim), rngs))

    def project(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Queries, keys, values, β `[tokens, heads]` and log_decay `[tokens, heads, key_dim]`."""
        logits = self.decay_up(self.decay_down(tokens)).reshape(len(tokens), self.heads, self.key_dim)
        decays = log_decays(logits, self.decay_rate[...], self.decay_bias[...])
        return super().project(tokens) | {"log_decay": decays}

    def gated(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        return heads * jax.nn.sigmoid(self.gate_up(self.gate_down(tokens)))
