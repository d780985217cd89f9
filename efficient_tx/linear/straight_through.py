"""Straight-through: forwards a rounded value, backwards the gradient of what was rounded (Bengio et al. 2013)."""

import jax


def straight_through(latent: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, bit for bit, with the gradient of `latent` (arXiv 1308.3432); both of one shape, `latent` finite."""
    return jax.lax.stop_gradient(rounded) + (latent - jax.lax.stop_gradient(latent))
