"""RetNet's retention (Sun et al. 2023, arXiv 2307.08621): a state that forgets at a fixed rate of each head.

    S_t = γ_h S_{t−1} + k_tᵀ v_t,    o_t = q_t S_t / √d_k,    γ_h = 1 − 2^(−5−h),  h = 0, 1, ...
    y_t = W_o [RMSNorm(o_t) ⊙ swish(W_g x_t)]

In the paper queries and keys turn with their positions: here that is `positions="rope"`, as in any mixer. The default
sizes are those of the authors' code: values twice as wide as keys. As in the code of flash-linear-attention, and unlike
in the paper: not xPos, whose decay is that of the state again; and no normalisation of the scores, which the norm of
each head cancels.
The method is causal; without `causal` it runs in both directions and the outputs are averaged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.recurrent.base import Recurrent, both_ways
from efficient_tx.kernels import gated_linear_attention
from efficient_tx.kernels.shapes import check_shapes


def retnet(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Attends with a state that decays by γ_h at every token: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
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
    run = partial(gated_linear_attention, k=k, v=v, log_decay=log_decays(q.shape[2]))
    return both_ways(run, q, k, mask=mask, causal=causal, name="retnet")


def log_decays(heads: int) -> jax.Array:
    """ln γ_h, `[heads]`."""
    return jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(heads)))


class RetNet(Recurrent):
    """The whole layer of retention; arguments as in `Recurrent`, but without a convolution there is no SiLU."""

    paper = "Sun et al. 2023, arXiv 2307.08621"
    computes = "a state that forgets at a fixed rate of each head; both ways if not causal"
    cost = "n"
    function = staticmethod(retnet)
    refuses: ClassVar = {"cross": "it needs positions"}
    heads_alike = False

    def __init__(
        self, features: int, *,
        expand_v: float = 2.0, conv: int = 0,
        linear: Callable = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs, **common: Any,
    ):  # fmt: skip
        own = {"linear": linear, "dtype": dtype, "rngs": rngs}
        super().__init__(features, expand_v=expand_v, conv=conv, **own, **common)
        self.gate = linear(features, self.heads * self.head_dim, use_bias=False, dtype=dtype, rngs=rngs)

    def project(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Queries, keys and values; only a convolution is followed by a SiLU."""
        return MultiHead.project(self, tokens)

    def recurrence(
        self, parts: dict[str, jax.Array], memory: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        return gated_linear_attention(**parts, log_decay=log_decays(self.heads), initial_state=memory, mask=mask)

    def gated(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        return heads * jax.nn.silu(self.gate(tokens))
