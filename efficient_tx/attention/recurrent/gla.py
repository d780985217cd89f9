"""GLA, gated linear attention (Yang et al. 2024, arXiv 2312.06635): a state with a decay per channel and token.

    S_t = diag(exp g_t) S_{t−1} + k_tᵀ v_t,    o_t = q_t S_t / √d_k,    g_t = logsigmoid(W₂ W₁ x_t + b) / 16
    y_t = W_o [RMSNorm(o_t) ⊙ swish(W_g x_t)]

The default sizes are those of the authors' code (flash-linear-attention): keys half as wide as values, W₁ of rank 16,
no bias except b. Not normalised: the weights of a query do not sum to 1. The method is causal; without `causal` it runs
in both directions with the same projections, and the outputs are averaged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.recurrent.base import Recurrent, both_ways
from efficient_tx.checks import OptionError, at_least
from efficient_tx.kernels import gated_linear_attention
from efficient_tx.kernels.shapes import check_rank, check_shapes


def gla(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    log_decay: jax.Array | None = None, mask: jax.Array | None = None, key: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Attends with a decaying state, or with one in each direction: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      log_decay: logarithm of the decay, at most 0: `[batch, keys, heads, head_dim]`, `[batch, keys, heads]`, `[heads]`,
        or None for no decay.
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
    run = partial(gated_linear_attention, k=k, v=v, log_decay=log_decay)
    return both_ways(run, q, k, mask=mask, causal=causal, name="gla")


def gla_step(
    q: jax.Array, k: jax.Array, v: jax.Array, state: jax.Array, *, log_decay: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token of causal `gla`: its output and the next state.

    Args:
      q: `[batch, heads, head_dim]`.
      k: `[batch, groups, head_dim]`; groups divides heads.
      v: `[batch, groups, v_dim]`.
      state: `[batch, heads, head_dim, v_dim]`; zeros before the first token.
      log_decay: logarithm of the decay, at most 0: `[batch, heads, head_dim]`, `[batch, heads]`, `[heads]` or None.

    Returns:
      `[batch, heads, v_dim]` in the dtype of q, and the state in promote_types(dtype, float32).
    """
    check_rank("batch, heads, dim", q=q, k=k, v=v)
    q, k, v = (x[:, None] for x in (q, k, v))
    if log_decay is not None and log_decay.ndim > 1:
        log_decay = log_decay[:, None]
    out, state = gated_linear_attention(q, k, v, log_decay=log_decay, initial_state=state)
    return out[:, 0], state


class GLA(Recurrent):
    """The whole layer of gated linear attention; other arguments as in `Recurrent`.

    Args:
      expand_k: width of queries and keys divided by that of a head.
      gate_rank: rank of the linear map from tokens to decays.
      gate_normalizer: divisor of the log decays; with 16 the initial memory is tens of tokens.
      clamp_min: lower bound of the log decays, below 0; None means no bound.
      conv: size of the depthwise convolution of queries, keys and values, see `MultiHead`; 0 means none. Decays and
        gate have no convolution. A SiLU follows it, as in the authors' code. As there is no softmax and no feature map,
        the SiLU makes most inner products of queries and keys positive; associative recall (`data.recall`) is not
        learnt without it.

    Raises:
      ValueError: an option out of its range.
    """

    paper = "Yang et al. 2024, arXiv 2312.06635"
    computes = "a state that forgets, per channel and token; both ways if not causal"
    cost = "n"
    function = staticmethod(gla)
    refuses: ClassVar = {"cross": "it needs positions"}

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"log_decay": (-np.abs(rng.normal(size=q.shape)) / 16).astype(np.float32)}

    def __init__(
        self, features: int, *,
        expand_k: float = 0.5, gate_rank: int = 16, gate_normalizer: float = 16.0, clamp_min: float | None = None,
        conv: int = 0, linear: Callable = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs, **common: Any,
    ):  # fmt: skip
        at_least(1, gate_rank=gate_rank)
        if not gate_normalizer > 0:
            raise OptionError("gate_normalizer", gate_normalizer, "it must be above 0")
        if clamp_min is not None and not clamp_min < 0:
            raise OptionError("clamp_min", clamp_min, "the least logarithm of a decay must be below 0, or None")
        own = {"linear": linear, "dtype": dtype, "rngs": rngs}
        super().__init__(features, expand_k=expand_k, conv=conv, **own, **common)
        self.gate = linear(features, self.heads * self.head_dim, use_bias=False, dtype=dtype, rngs=rngs)
        self.decay_down = nnx.Linear(features, gate_rank, use_bias=False, dtype=dtype, rngs=rngs)
        self.decay_up = nnx.Linear(gate_rank, self.heads * self.key_dim, dtype=dtype, rngs=rngs)
        self.gate_normalizer, self.clamp_min = gate_normalizer, clamp_min

    def project(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Queries, keys, values and log_decay; only a convolution is followed by a SiLU."""
        logits = self.decay_up(self.decay_down(tokens))
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        log_decay = jax.nn.log_sigmoid(logits) / self.gate_normalizer
        if self.clamp_min is not None:
            log_decay = jnp.maximum(log_decay, self.clamp_min)
        return MultiHead.project(self, tokens) | {"log_decay": log_decay.reshape(len(tokens), self.heads, -1)}

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array, *,
        mask: jax.Array | None, key: jax.Array | None,
    ) -> jax.Array:  # fmt: skip
        return gla(q, k, v, log_decay=log_decay, **self.arguments(mask=mask, key=key))

    def recurrence(
        self, parts: dict[str, jax.Array], memory: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        return gated_linear_attention(**parts, initial_state=memory, mask=mask)

    def gated(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        return heads * jax.nn.silu(self.gate(tokens))
