"""Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state space model whose decay is one number for each head and token.

    S_t = exp(−a_h Δ_t) S_{t−1} + Δ_t B_tᵀ x_t,    o_t = C_t S_t + d_h x_t,    Δ_t = softplus(w x_t + b)
    y_t = W_o RMSNorm(o_t ⊙ swish(W_z x_t))

x, B and C pass a short convolution and a SiLU; all heads share B and C, as keys and queries. The default sizes and
initial values are those of the authors' code: x twice as wide as the tokens, 128 states, a uniform in [1, 16],
softplus(b) log-uniform in [0.001, 0.1], d = 1; but the convolution, which has a bias there, is `ShortConv`. The method
is causal; without `causal` it runs in both directions with the same projections, and the outputs are averaged. The
authors' heads are 64 wide: choose as many.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead, width_of_head
from efficient_tx.attention.recurrent.base import both_ways, log_time_steps
from efficient_tx.checks import OptionError, at_least
from efficient_tx.kernels import gated_linear_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.flat import scaled


def mamba2(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    step: jax.Array, rate: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None,
    causal: bool = False,
) -> jax.Array:  # fmt: skip
    """The state space model without its skip: time and memory are linear in the length.

    Args:
      q: C, `[batch, queries, heads, states]`.
      k: B, `[batch, keys, groups, states]`; groups divides heads.
      v: x, `[batch, keys, groups, v_dim]`.
      step: Δ, above 0, `[batch, keys, heads]`.
      rate: a, above 0, `[heads]`.
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
    run = partial(state_space, k=k, v=v, step=step, rate=rate)
    return both_ways(run, q, k, mask=mask, causal=causal, name="mamba2")


def state_space(
    q: jax.Array, k: jax.Array, v: jax.Array, *, step: jax.Array, rate: jax.Array, **others: Any
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The outputs and the last state; Δ multiplies the values, of which every head has its own then."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    steps = step.astype(jnp.promote_types(step.dtype, jnp.float32))
    v = scaled(v, steps[..., None]).astype(v.dtype)
    return gated_linear_attention(q, k, v, log_decay=scaled(steps, -rate), scale=1.0, **others)


class Mamba2(MultiHead):
    """The whole layer of Mamba-2; other arguments as in `MultiHead`.

    Args:
      head_dim: the width that `expand` multiplies; None means features // heads.
      expand: width of all heads together, divided by that of the tokens.
      states: length of B and C.
      conv: size of the depthwise convolutions of x, B and C, each followed by a SiLU; 0 means none, and the SiLU stays.

    Raises:
      ValueError: an option out of its range.
    """

    paper = "Dao and Gu 2024, arXiv 2405.21060"
    computes = "a state space model with one decay per head and token; both ways if not causal"
    cost = "n"
    function = staticmethod(mamba2)
    refuses: ClassVar = {"cross": "it needs positions"}
    has_positions = False

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        steps = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), q.shape[:3]))
        return {"step": steps.astype(np.float32), "rate": rng.uniform(1, 16, q.shape[2]).astype(np.float32)}

    def __init__(
        self, features: int, *,
        heads: int, head_dim: int | None = None, expand: float = 2.0, states: int = 128, conv: int = 4,
        linear: Callable = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs, **common: Any,
    ):  # fmt: skip
        width = width_of_head(features, heads, head_dim)
        at_least(1, states=states)
        if not width * expand >= 1:
            raise OptionError("expand", expand, f"with head_dim {width} it must be at least {1 / width:g}")
        self.states = states
        own = {"linear": partial(linear, use_bias=False), "dtype": dtype, "rngs": rngs}
        super().__init__(features, heads=heads, head_dim=round(expand * width), conv=conv, **own, **common)
        inner = self.heads * self.head_dim
        self.gate = linear(features, inner, use_bias=False, dtype=dtype, rngs=rngs)
        self.time = nnx.Linear(features, heads, use_bias=False, dtype=dtype, rngs=rngs)
        self.time_bias = nnx.Param(log_time_steps((heads,), rngs))
        self.log_rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (heads,), jnp.float32, 1, 16)))
        self.skip = nnx.Param(jnp.ones(heads, jnp.float32))
        self.norm = nnx.RMSNorm(inner, epsilon=1e-5, dtype=dtype, rngs=rngs)

    def widths(self) -> dict[str, int]:
        return {"q": self.states, "k": self.states, "v": self.heads * self.head_dim}

    def project(self, tokens: jax.Array) -> dict[str, jax.Array]:
        """C and B `[tokens, 1, states]`, x `[tokens, heads, head_dim]` and Δ `[tokens, heads]`."""
        parts = {name: getattr(self, name)(tokens) for name in ("q", "k", "v")}
        if not self.short_conv:
            parts = {name: self.activate(x) for name, x in parts.items()}
        q, k, v = (x.reshape(len(tokens), groups, -1) for x, groups in zip(parts.values(), (1, 1, self.heads)))
        logits = self.time(tokens)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return {"q": q, "k": k, "v": v, "step": jax.nn.softplus(logits + self.time_bias[...])}

    def activate(self, convolved: jax.Array) -> jax.Array:
        return jax.nn.silu(convolved)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, step: jax.Array, *,
        mask: jax.Array | None, key: jax.Array | None,
    ) -> jax.Array:  # fmt: skip
        given = {"step": step, "rate": jnp.exp(self.log_rate[...])}
        out = mamba2(self.for_heads(q), self.for_heads(k), v, **given, **self.arguments(mask=mask, key=key))
        return self.skipped(out, v)

    def remember(
        self, projected: dict[str, jax.Array], memory: jax.Array, *,
        mask: jax.Array | None, count: jax.Array, first: bool,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        q, k, v, step = projected.values()
        given = {"step": step, "rate": jnp.exp(self.log_rate[...]), "initial_state": memory, "mask": mask}
        out, memory = state_space(self.for_heads(q), self.for_heads(k), v, **given)
        return self.skipped(out, v), memory

    def for_heads(self, x: jax.Array) -> jax.Array:
        """`[batch, length, 1, states]` for every head."""
        return jnp.broadcast_to(x, (*x.shape[:2], self.heads, x.shape[-1]))

    def skipped(self, out: jax.Array, x: jax.Array) -> jax.Array:
        return out + scaled(x, self.skip[...].astype(x.dtype)[:, None])

    def empty_memory(self, batch: int, max_len: int | None, dtype: jnp.dtype) -> jax.Array:
        """`[batch, heads, states, head_dim]`."""
        return jnp.zeros((batch, self.heads, self.states, self.head_dim), jnp.promote_types(dtype, jnp.float32))

    def state_numbers(self, length: int) -> int:
        return self.heads * self.states * self.head_dim

    def finish(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        """Gate, norm over all heads, and output projection."""
        gated = heads.reshape(len(tokens), -1) * jax.nn.silu(self.gate(tokens))
        return self.out(self.norm(gated))
