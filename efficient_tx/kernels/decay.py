"""Logarithms of decays."""

import jax
import jax.numpy as jnp


def finite(log_decay: jax.Array, terms: int) -> jax.Array:
    """With finite sums of so many, so that −inf (forget everything) does not give NaN; real parts of complex ones."""
    least = jnp.finfo(log_decay.dtype).min / (2 * terms)
    if jnp.iscomplexobj(log_decay):
        return jax.lax.complex(jnp.maximum(log_decay.real, least), log_decay.imag)
    return jnp.maximum(log_decay, least)
