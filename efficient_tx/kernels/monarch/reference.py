"""The Monarch product by the plain formula. Differentiable in both modes."""

import jax
import jax.numpy as jnp


def unsupported(*, interpret: bool) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    return "interpret=True is for Pallas kernels, the plain formula has nothing to interpret" if interpret else None


def forward(x: jax.Array, w1: jax.Array, w2: jax.Array) -> jax.Array:
    """The product `[..., s·l]` of x `[..., k·p]`, w1 `[k, q, p]` and w2 `[l, s, r]`, all of one dtype."""
    k, _, p = w1.shape
    l, s, r = w2.shape
    batch = x.shape[:-1]
    hidden = jnp.einsum("...kp,kqp->...kq", x.reshape(*batch, k, p), w1)
    return jnp.einsum("...rl,lsr->...sl", hidden.reshape(*batch, r, l), w2).reshape(*batch, s * l)
