"""What the delta rule has beside gated linear attention in a chunk of one head, in the operations of Pallas kernels."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.gated_linear_attention.chunk import NoDecay, Products, positions


def matrix(decay: NoDecay, k: jax.Array) -> jax.Array:
    """M of `xla`, `[tokens, tokens]`, zero on and above the diagonal."""
    return jnp.where(decay.row > decay.column, decay.weights(k, k), 0)


def inverse(lower: jax.Array) -> jax.Array:
    """The inverse of I + `lower`, which is zero on and above the diagonal, from its diagonal blocks; see `xla`.

    In full float32 always, as the products of other factors need not be.
    """
    dot = Products(jnp.dtype(jnp.float32), jax.lax.Precision.HIGHEST)
    row, column = positions(lower.shape[0])

    def level(n, found):
        between = jnp.where((row ^ column) >> n == 1, lower, 0)
        return found - dot(dot(found, between), found)

    pairs = jnp.where(row == column, 1.0, jnp.where((row ^ column) == 1, -lower, 0))
    return jax.lax.fori_loop(1, lower.shape[0].bit_length() - 1, level, pairs)
