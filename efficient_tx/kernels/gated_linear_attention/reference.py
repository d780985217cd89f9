"""Gated linear attention by the recurrence, one token at a time. Differentiable in both modes."""

import jax
import jax.numpy as jnp


def unsupported(*, interpret: bool) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    return "interpret=True is for Pallas kernels, the plain recurrence has nothing to interpret" if interpret else None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, state: jax.Array,
    reverse: bool, precision: jax.lax.PrecisionLike,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output `[batch, length, heads, v_dim]` and the state after the last step.

    `q` and `k` are `[batch, length, heads, head_dim]`, `v` is `[batch, length, heads, v_dim]`, `log_decay` is
    `[batch, length, heads, head_dim or 1]` or None, `state` is `[batch, heads, head_dim, v_dim]`. All have one dtype,
    float32 or float64.
    """
    log_decay = jnp.zeros_like(q[..., :1]) if log_decay is None else log_decay

    def step(state, token):
        q, k, v, log_decay = token
        state = jnp.exp(log_decay)[..., None] * state + k[..., :, None] * v[..., None, :]
        return state, jnp.einsum("bhk,bhkv->bhv", q, state, precision=precision)

    state, out = jax.lax.scan(step, state, [x.swapaxes(0, 1) for x in (q, k, v, log_decay)], reverse=reverse)
    return out.swapaxes(0, 1), state
