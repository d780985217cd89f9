"""The gated delta rule by the recurrence, one token at a time. Differentiable in both modes."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.gated_linear_attention.options import Options


def unsupported(options: Options, *arrays: jax.Array | None) -> None:
    """The recurrence supports everything."""


def forward(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, log_decay: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output `[batch, length, heads, v_dim]` in the dtype of q, and the state after the last step.

    `q` is `[batch, length, heads, head_dim]`, `k` is `[batch, length, groups, head_dim]`, `v` is
    `[batch, length, groups, v_dim]`, `beta` is `[batch, length, heads, 1]`, `log_decay` is
    `[batch, length, heads, head_dim or 1]` or None, `state` is `[batch, heads, head_dim, v_dim]`, float32 or float64.
    """
    heads, groups = q.shape[2], k.shape[2]
    log_decay = jnp.zeros_like(q[..., :1]) if log_decay is None else log_decay
    tokens = (q, jnp.repeat(k, heads // groups, axis=2), jnp.repeat(v, heads // groups, axis=2), beta, log_decay)

    def read(key, state):
        return jnp.einsum("bhk,bhkv->bhv", key, state, precision=options.precision)

    def step(state, token):
        q, k, v, beta, log_decay = token
        state = jnp.exp(log_decay)[..., None] * state
        state += k[..., :, None] * (beta * (v - read(k, state)))[..., None, :]
        return state, read(options.scale * q, state)

    tokens = [x.swapaxes(0, 1).astype(state.dtype) for x in tokens]
    state, out = jax.lax.scan(step, state, tokens, reverse=options.reverse)
    return out.swapaxes(0, 1).astype(q.dtype), state
