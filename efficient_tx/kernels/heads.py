"""One function of a head, run for all heads of all examples: in turn on CPUs, at once on accelerators."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


def each_head(function: Callable, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`function(example, head, *slices)` for every head of every example.

    A CPU keeps one head in its cache, so it takes one after another; an accelerator is filled by all of them only.

    Args:
      function: takes the two indices and each array's `[length, dim]` of that head; returns a tuple of arrays
        `[length, dim]`.
      *arrays: `[batch, length, heads, dim]`, of any lengths and dims.

    Returns:
      The results as `[batch, length, heads, dim]`.
    """
    return jax.lax.platform_dependent(*arrays, cpu=partial(_in_turn, function), default=partial(_at_once, function))


def _at_once(function, *arrays):
    batch, _, heads, _ = arrays[0].shape
    axes = (0, *(1 for _ in arrays))
    of_example = jax.vmap(function, (None, *axes), 1)
    return jax.vmap(of_example, (0, None, *(0 for _ in arrays)))(jnp.arange(batch), jnp.arange(heads), *arrays)


def _in_turn(function, *arrays):
    batch, _, heads, _ = arrays[0].shape

    def head(n, results):
        example, head = n // heads, n % heads
        found = function(example, head, *(_slice(x, example, head) for x in arrays))
        return tuple(
            jax.lax.dynamic_update_slice(x, y[None, :, None], (example, 0, head, 0)) for x, y in zip(results, found)
        )

    index = jax.ShapeDtypeStruct((), jnp.int32)
    slices = (jax.ShapeDtypeStruct((x.shape[1], x.shape[3]), x.dtype) for x in arrays)
    found = jax.eval_shape(function, index, index, *slices)
    results = tuple(jnp.zeros((batch, x.shape[0], heads, x.shape[1]), x.dtype) for x in found)
    return jax.lax.fori_loop(0, batch * heads, head, results)


def _slice(x, example, head):
    _, length, _, dim = x.shape
    return jax.lax.dynamic_slice(x, (example, 0, head, 0), (1, length, 1, dim)).reshape(length, dim)
