"""The linear recurrence one token at a time. Differentiable in both modes."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.linear_scan.options import Options


def unsupported(options: Options, *arrays: jax.Array) -> None:
    """The plain recurrence supports everything."""


def forward(options: Options, x: jax.Array, log_decay: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states `[batch, length, dim]` and the last of them `[batch, dim]`, in the dtype of `state`.

    `x` and `log_decay` are `[batch, length, dim]`, `state` is `[batch, dim]`, float32, float64 or complex.
    """

    def step(state, token):
        x, log_decay = token
        state = jnp.exp(log_decay) * state + x
        return state, state

    tokens = [x.astype(state.dtype).swapaxes(0, 1) for x in (x, log_decay)]
    end, states = jax.lax.scan(step, state, tokens, reverse=options.reverse)
    return states.swapaxes(0, 1), end
