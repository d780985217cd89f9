"""HGRN, the hierarchically gated recurrence (Qin et al. 2023, arXiv 2311.04823), and HGRN2 (2024, arXiv 2404.07904).

    f_t = l + (1 − l) σ(W_f x_t),    0 ≤ l < 1
    HGRN:   h_t = f_t ⊙ h_{t−1} + (1 − f_t) ⊙ silu(W_v x_t),            y_t = W_o [RMSNorm(h_t) ⊙ silu(W_g x_t)]
    HGRN2:  S_t = diag(f_t) S_{t−1} + (1 − f_t)ᵀ W_v x_t,               y_t = W_o RMSNorm(silu(W_q x_t) S_t)

HGRN carries one number a channel, real as in flash-linear-attention; the paper's turns in the complex plane besides,
by a learnt angle. HGRN2 spreads it over `states` numbers, as many as f has then for each head. Layouts and defaults are
those of flash-linear-attention: no bias, no convolution. There the lower bounds l of all layers are learnt together and
grow with the depth, from 0 in the first layer; here l is a constant of the layer.
The method is causal; without `causal` it runs in both directions with the same projections, and the outputs are
averaged.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.checks import OptionError, at_least
from efficient_tx.kernels import gated_linear_attention, linear_scan
from efficient_tx.kernels.shapes import check_rank
from efficient_tx.tokens.mask import key_mask, over


def check_options(*, lower_bound):
    """Raises ValueError, one line, for the first option that is out of its range."""
    if not 0 <= lower_bound < 1:
        raise OptionError("lower_bound", lower_bound, "the least share that is kept must be at least 0 and below 1")


@checked_by(check_options)
def hgrn(
    forget: jax.Array, v: jax.Array, *,
    q: jax.Array | None = None, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    lower_bound: float = 0.0,
) -> jax.Array:  # fmt: skip
    """A recurrence that keeps the share f of its state: time and memory are linear in the length.

    Args:
      forget: logits of f before the lower bound, `[batch, length, heads, head_dim]`; with q `[..., states]`.
      v: `[batch, length, heads, head_dim]`.
      q: `[batch, length, heads, states]`: then the state of a head is a matrix `[states, head_dim]`, which q reads.
      mask: bool `[batch, length]` or `[batch, 1, 1, length]`, True for real tokens; padding does not change the state.
      key: unused, nothing is drawn.
      causal: token i sees tokens j ≤ i only. False: the mean of both directions.
      lower_bound: l, the least share that is kept.

    Returns:
      `[batch, length, heads, head_dim]` in the dtype of v. The arithmetic is float32 at least.

    Raises:
      ValueError: a lower bound out of its range, or shapes that do not fit.
    """
    check_rank(forget=forget, v=v)
    shape = v.shape if q is None else (*v.shape[:3], q.shape[-1])
    if forget.shape != shape or (q is not None and q.shape != shape):
        raise ValueError(f"forget has shape {forget.shape}: with these values and queries it must be {shape}")
    run = partial(keeping, forget, v, q, lower_bound=lower_bound, mask=key_mask(mask, *v.shape[:2]))
    out, _ = run()
    return out if causal else (out + run(reverse=True)[0]) / 2


def keeping(
    forget: jax.Array, v: jax.Array, q: jax.Array | None, *,
    lower_bound: float, mask: jax.Array | None, initial_state: jax.Array | None = None, reverse: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The outputs and the last state, `[batch, heads, head_dim]` or with q `[batch, heads, states, head_dim]`."""
    logits = forget.astype(jnp.promote_types(forget.dtype, jnp.float32))
    log_decay, new = jax.nn.log_sigmoid(logits), (1 - lower_bound) * jax.nn.sigmoid(-logits)
    if lower_bound:
        log_decay = jnp.logaddexp(jnp.log(lower_bound), jnp.log1p(-lower_bound) + log_decay)
    if q is not None:
        given = {"log_decay": log_decay, "scale": 1.0, "initial_state": initial_state, "mask": mask, "reverse": reverse}
        return gated_linear_attention(q, new.astype(v.dtype), v, **given)
    x = new * v
    if mask is not None:
        x, log_decay = (jnp.where(over(mask, part), part, 0) for part in (x, log_decay))
    of_head = v.shape[2:]
    flat = (*v.shape[:2], math.prod(of_head))
    state = None if initial_state is None else initial_state.reshape(len(v), flat[2])
    out, end = linear_scan(x.reshape(flat), log_decay.reshape(flat), initial_state=state, reverse=reverse)
    return out.reshape(v.shape).astype(v.dtype), end.reshape(len(v), *of_head)


class HGRN(MultiHead):
    """The whole layer of HGRN or HGRN2; options as in `hgrn`, other arguments as in `MultiHead`.

    Args:
      states: None: HGRN. A number: HGRN2 with a state `[states, head_dim]` in each head; its authors take 128.
      conv: size of the depthwise convolutions of f, of v and in HGRN2 of q; 0 means none.
    """

    paper = "Qin et al. 2023, arXiv 2311.04823; 2024, arXiv 2404.07904"
    computes = "a gated recurrence in every channel, or with expanded states; both ways if not causal"
    cost = "n"
    function = staticmethod(hgrn)
    projections = ("forget", "v")
    refuses: ClassVar = {"cross": "it needs positions"}
    has_positions = False

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"states": budget}

    def __init__(
        self, features: int, *,
        states: int | None = None, linear: Callable = nnx.Linear, dtype: jnp.dtype | None = None, rngs: nnx.Rngs,
        **common: Any,
    ):  # fmt: skip
        self.states = states
        if states is not None:
            at_least(1, states=states)
            self.projections = ("forget", "v", "q")
        own = {"linear": partial(linear, use_bias=False), "dtype": dtype, "rngs": rngs}
        super().__init__(features, **own, **common)
        inner = self.heads * self.head_dim
        self.norm = nnx.RMSNorm(inner, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.gate = own["linear"](features, inner, dtype=dtype, rngs=rngs) if states is None else None

    def widths(self) -> dict[str, int]:
        keys = self.heads * (self.states or self.head_dim)
        return {name: self.heads * self.head_dim if name == "v" else keys for name in self.projections}

    def activated(self, parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The values of HGRN and the queries of HGRN2 behind their SiLU."""
        name = "v" if self.states is None else "q"
        return {"q": None} | parts | {name: jax.nn.silu(parts[name])}

    def attend(self, *parts: jax.Array, mask: jax.Array | None, key: jax.Array | None) -> jax.Array:
        named = self.activated(dict(zip(self.projections, parts)))
        return hgrn(**named, **self.arguments(mask=mask, key=key))

    def state_numbers(self, length: int) -> int:
        return self.heads * (self.states or 1) * self.head_dim

    def empty_memory(self, batch: int, max_len: int | None, dtype: jnp.dtype) -> jax.Array:
        """`[batch, heads, head_dim]`, with `states` before the last axis if there are."""
        of_head = (self.head_dim,) if self.states is None else (self.states, self.head_dim)
        return jnp.zeros((batch, self.heads, *of_head), jnp.promote_types(dtype, jnp.float32))

    def remember(
        self, projected: dict[str, jax.Array], memory: jax.Array, *,
        mask: jax.Array | None, count: jax.Array, first: bool,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        given = {"lower_bound": self.lower_bound, "initial_state": memory, "mask": mask}
        return keeping(**self.activated(projected), **given)

    def finish(self, heads: jax.Array, tokens: jax.Array) -> jax.Array:
        """Norm over all heads, the gate of HGRN, and output projection."""
        normed = self.norm(heads.reshape(len(tokens), -1))
        return self.out(normed if self.gate is None else normed * jax.nn.silu(self.gate(tokens)))
