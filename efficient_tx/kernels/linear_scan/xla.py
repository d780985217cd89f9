"""The linear recurrence in XLA: token by token on CPUs, where it stays in cache, as an associative scan elsewhere.

Two steps in a row are one of the same kind, (a, x) then (b, y) is (ba, bx + y). So the prefixes of all tokens follow in
a logarithmic number of operations on whole arrays (Blelloch 1990, Prefix sums and their applications).

The backward pass is the same recurrence in the other direction. With a_t = exp(log_decay_t) and h̄_t the cotangent of
the states,

    y_t = a_t (y_{t+1} + h̄_t),    x̄_t = h̄_t + y_{t+1},    d log_decay_t = y_t h_{t−1},

where y after the last step is the cotangent of the final state, and y_1 is that of the initial one. All of it is
holomorphic, and jax's cotangents are not conjugated: complex numbers need nothing more.
"""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.linear_scan import reference
from efficient_tx.kernels.linear_scan.options import Options
from efficient_tx.kernels.platform import by_platform


def unsupported(options: Options, x: jax.Array, *_: jax.Array) -> str | None:
    """The reason why it does not support the arguments, or None."""
    return None if x.size else f"x has shape {x.shape}: there is nothing to compute"


def sizes(options: Options, *arrays: jax.Array) -> None:
    """It has no blocks."""


def forward(
    options: Options, sizes: None, x: jax.Array, log_decay: jax.Array, state: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    """The states `[batch, length, dim]` and the last of them `[batch, dim]`; nothing else is saved.

    `x` and `log_decay` are `[batch, length, dim]`, `state` is `[batch, dim]` and has the dtype of the results.
    """

    def serial(x, log_decay, state):
        return reference.forward(options, x, log_decay, state)

    def parallel(x, log_decay, state):
        decay = jnp.exp(log_decay.astype(state.dtype))
        states = scan(decay, x.astype(state.dtype), state, options.reverse)
        return states, last(states, state, options.reverse)

    return by_platform({"cpu": serial, "default": parallel}, x, log_decay, state), ()


def backward(options: Options, sizes: None, arrays: tuple, outputs: tuple, saved: tuple, cotangents: tuple):
    """Cotangents of x, log_decay and the initial state, from those of the states and of the last of them."""
    x, log_decay, state = arrays
    states, _ = outputs
    d_states, d_end = cotangents

    def serial(log_decay, before, d_states, d_end):
        def step(y, token):
            log_decay, before, d_state = token
            d_x = d_state + y
            y = jnp.exp(log_decay) * d_x
            return y, (d_x, y * before)

        tokens = [x.swapaxes(0, 1) for x in (log_decay, before, d_states)]
        d_start, found = jax.lax.scan(step, d_end, tokens, reverse=not options.reverse)
        return *(x.swapaxes(0, 1) for x in found), d_start

    def parallel(log_decay, before, d_states, d_end):
        decay = jnp.exp(log_decay)
        y = scan(decay, decay * d_states, d_end, not options.reverse)
        d_x = d_states + previous(y, d_end, not options.reverse)
        return d_x, y * before, last(y, d_end, not options.reverse)

    before = previous(states, state, options.reverse)
    operands = log_decay.astype(state.dtype), before, d_states, d_end
    d_x, d_log_decay, d_start = by_platform({"cpu": serial, "default": parallel}, *operands)
    return d_x.astype(x.dtype), d_log_decay.astype(log_decay.dtype), d_start


def scan(decay: jax.Array, x: jax.Array, state: jax.Array, reverse: bool) -> jax.Array:
    """All states `[batch, length, dim]` of h_t = decay_t h_{t−1} + x_t, of one dtype, by an associative scan."""

    def two(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    decay, x = jax.lax.associative_scan(two, (decay, x), axis=1, reverse=reverse)
    return x + decay * state[:, None]


def previous(states: jax.Array, state: jax.Array, reverse: bool) -> jax.Array:
    """The state before every step, of which the first is `state`."""
    if reverse:
        return jnp.concatenate([states[:, 1:], state[:, None]], axis=1)
    return jnp.concatenate([state[:, None], states[:, :-1]], axis=1)


def last(states: jax.Array, state: jax.Array, reverse: bool) -> jax.Array:
    """The state after the last step, `state` if there is none."""
    return state if not states.shape[1] else states[:, 0 if reverse else -1]
