"""Gated DeltaNet (Yang et al. 2025, arXiv 2412.06464): a state that forgets, then corrects what it holds of a key.

    S = exp(g_t) S_{t−1},    S_t = S + β_t k_tᵀ (v_t − k_t S),    o_t = q_t S_t / √d_k
    g_t = −exp(a) softplus(w_a x_t + b),    β_t = σ(w_β x_t),    y_t = W_o [RMSNorm(o_t) ⊙ swish(W_g x_t)]

One decay for each head and token. q and k have length 1, as in `delta`. The default sizes and initial decays are those
of flash-linear-attention's layer: values twice as wide as keys, exp(a) uniform in [0, 16], softplus(b) log-uniform in
[0.001, 0.1]. Its models have keys of 0.75 · features in all heads together, here `head_dim` says that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.recurrent.base import both_ways, log_time_steps
from efficient_tx.attention.recurrent.delta import Delta, correcting
from efficient_tx.kernels.shapes import check_shapes


def gated_delta(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    beta: jax.Array, log_decay: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Attends with a state that forgets and is corrected: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`, divided by its length here.
      k: `[batch, keys, groups, head_dim]`, as q; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      beta: the share of the correction, `[batch, keys, heads]`, stable in [0, 2].
      log_decay: logarithm of the decay, at most 0: `[batch, keys, heads]`, or per channel with one more axis.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; padding does not change the state.
      key: unused, nothing is drawn.
      causal: query i sees keys j ≤ i only. If the numbers of queries and keys differ, the last query is at the last
        real key. False: the mean of both directions.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. The arithmetic is float32 at
      least.

    Raises:
      ValueError: different numbers of queries and keys without `causal`, or shapes that do not fit.
    """
    check_shapes(q, k, v)
    run = partial(correcting, k=k, v=v, beta=beta, log_decay=log_decay)
    return both_ways(run, q, k, mask=mask, causal=causal, name="gated_delta")


def log_decays(logits: jax.Array, rate: jax.Array, bias: jax.Array) -> jax.Array:
    """−exp(rate) softplus(logits + bias), float32 at least."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return -jnp.exp(rate) * jax.nn.softplus(logits + bias)


class GatedDelta(Delta):
    """The whole layer of Gated DeltaNet; arguments as in `Delta`."""

    paper = "Yang et al. 2025, arXiv 2412.06464"
    computes = "as `delta`, after a decay per head and token"
    function = staticmethod(gated_delta)

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        decays = (-np.abs(rng.normal(size=q.shape[:3])) / 16).astype(np.float32)
        return Delta.measured_with(q, budget, rng) | {"log_decay": decays}

    def __init__(
        self, features: int, *,
        expand_v: float = 2.0, linear: Callable = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs,
        **common: Any,
    ):  # fmt: skip
        super().__init__(features, expand_v=expand_v, linear=linear, dtype=dtype, rngs=rngs, **common)
        self.gate = linear(features, self.heads * self.head_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.decay = nnx.Linear(features, self.heads, use_bias=False, dtype=dtype, rngs=rngs)
        # Above 0, so that its logarithm is a number.
        rate = jax.random.uniform(rngs.params(), (self.heads,), jnp.float32, 1e-3, 16)
        self.decay_rate = nnx.Param(jnp.log(rate))
        self.decay_bias = nnx.Param(log_time_steps((self.heads,), rngs))

    def project(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Queries, keys, values, β and log_decay `[tokens, heads]`."""
        decays = log_decays(self.decay(tokens), self.decay_rate[...], self.decay_bias[...])
        return super().project(tokens) | {"log_decay": decays}

    def gated(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        return heads * jax.nn.silu(self.gate(tokens))
