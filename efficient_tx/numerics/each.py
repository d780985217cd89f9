"""One function of a matrix, or of several, run for each of a batch of them."""

from collections.abc import Callable

import jax


def of_each(function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`function` along the first axis of all arrays: in turn on a CPU, whose cache holds one, elsewhere at once."""

    def in_turn(*arrays):
        return jax.lax.map(lambda each: function(*each), arrays)

    return jax.lax.platform_dependent(*arrays, cpu=in_turn, default=jax.vmap(function))
