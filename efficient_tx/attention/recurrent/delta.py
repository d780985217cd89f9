"""DeltaNet (Yang et al. 2024, arXiv 2406.06484): a state that corrects what it holds of a key.

    S_t = S_{t−1} + β_t k_tᵀ (v_t − k_t S_{t−1}),    o_t = q_t S_t / √d_k,    β_t = σ(w_β x_t)
    y_t = W_o RMSNorm(o_t)

q and k have length 1, so that with β = 1 the state holds v_t of k_t exactly (Schlag et al. 2021, arXiv 2102.11174). The
default sizes are those of flash-linear-attention's layer, whose authors call the short convolutions crucial. The method
is causal; without `causal` it runs in both directions with the same projections, and the outputs are averaged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.recurrent.base import Recurrent, both_ways, unit
from efficient_tx.kernels import delta_rule
from efficient_tx.kernels.shapes import check_shapes


def delta(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    beta: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Attends with a state that is corrected token by token: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`, divided by its length here.
      k: `[batch, keys, groups, head_dim]`, as q; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      beta: the share of the correction, `[batch, keys, heads]`, stable in [0, 2].
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
    run = partial(correcting, k=k, v=v, beta=beta)
    return both_ways(run, q, k, mask=mask, causal=causal, name="delta")


def correcting(
    q: jax.Array, k: jax.Array, v: jax.Array, *, beta: jax.Array, **others: Any
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """`delta_rule` with queries and keys of length 1."""
    return delta_rule(unit(q), unit(k), v, beta=beta, **others)


class Delta(Recurrent):
    """The whole layer of DeltaNet; other arguments as in `Recurrent`.

    Args:
      negative: whether β reaches 2, so that the state may change its sign along a key (Grazzi et al. 2024, arXiv
        2411.12537).
    """

    paper = "Yang et al. 2024, arXiv 2406.06484"
    computes = "a state that corrects what it holds of a key; both ways if not causal"
    cost = "n"
    function = staticmethod(delta)
    refuses: ClassVar = {"cross": "it needs positions"}

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"beta": rng.random(q.shape[:3]).astype(np.float32)}

    def __init__(
        self, features: int, *,
        negative: bool = False, linear: Callable = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs,
        **common: Any,
    ):  # fmt: skip
        super().__init__(features, linear=linear, dtype=dtype, rngs=rngs, **common)
        self.beta = nnx.Linear(features, self.heads, use_bias=False, dtype=dtype, rngs=rngs)
        self.negative = negative

    def project(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """Queries, keys, values and β `[tokens, heads]`."""
        logits = self.beta(tokens)
        share = jax.nn.sigmoid(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
        return super().project(tokens) | {"beta": 2 * share if self.negative else share}

    def attend(self, *parts: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        q, k, v, *others = parts
        named = dict(zip(("beta", "log_decay"), others))
        return self.function(q, k, v, **named, **self.arguments(mask=mask, key=key))

    def recurrence(
        self, parts: dict[str, jax.Array], memory: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        return correcting(**parts, initial_state=memory, mask=mask)
