"""What the delta rule has beside gated linear attention in a chunk of one head, in the operations of Pallas kernels."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.gated_linear_attention.chunk import NoDecay, positions


def matrix(decay: NoDecay, k: jax.Array) -> jax.Array:
    """M of `xla`, `[tokens, tokens]`, zero on and above the diagonal."""
    return jnp.where(decay.row > decay.column, decay.weights(k, k), 0)


def inverse(lower: jax.Array) -> jax.Array:
    """The inverse of I + `lower`, which is zero on and above the diagonal, from its diagonal blocks; see `xla`."""
    row, column = positions(lower.shape[0])

    def level(n, found):
        between = jnp.where((row ^ column) >> n == 1, lower, 0)
        return found - exact(exact(found, between), found)

    pairs = jnp.where(row == column, 1.0, jnp.where((row ^ column) == 1, -lower, 0))
    return jax.lax.fori_loop(1, lower.shape[0].bit_length() - 1, level, pairs)


def exact(x: jax.Array, y: jax.Array) -> jax.Array:
    """The product of float32 tiles to the last bit or two, by fast products of parts of their factors, 8 bits each."""
    x, y = parts(x), parts(y)
    pairs = [(x[n], y[m]) for n in range(3) for m in range(3 - n)]
    return sum(jax.lax.dot(a, b, preferred_element_type=jnp.float32) for a, b in pairs[::-1])


def parts(x: jax.Array) -> list[jax.Array]:
    """Three bfloat16 arrays whose sum is the float32 array x."""
    found = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & -(1 << 16)
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        found.append(part.astype(jnp.bfloat16))
        x -= part
    return found
