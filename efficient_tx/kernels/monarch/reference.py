"""The Monarch product by the plain formula. Differentiable in both modes."""

import jax
import jax.numpy as jnp


def unsupported(options: None, *arrays: jax.Array) -> None:
    """It supports everything."""


def forward(options: None, x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """The product `[..., s·l]` of x `[..., k·p]`, w1 `[k, q, p]` and w2 `[l, s, r]`, all of one dtype."""
    k, _, p = w1.shape
    l, s, r = w2.shape
    batch, precision = x.shape[:-1], jax.lax.Precision.HIGHEST
    hidden = jnp.einsum("...kp,kqp->...kq", x.reshape(*batch, k, p), w1, precision=precision)
    out = jnp.einsum("...rl,lsr->...sl", hidden.reshape(*batch, r, l), w2, precision=precision)
    return out.reshape(*batch, s * l)
