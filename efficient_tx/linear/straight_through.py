"""Straight-through estimator: rounded value forward, gradient of the unrounded value (Bengio et al. 2013)."""

import jax


def straight_through(latent: jax.Array, rounded: jax.Array) -> jax.Array:
    """Exactly `rounded`, with the gradient of `latent` (arXiv 1308.3432); equal shapes, `latent` finite."""
    return jax.lax.stop_gradient(rounded) + (latent - jax.lax.stop_gradient(latent))
