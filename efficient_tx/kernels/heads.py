"""One function of a head, run for all heads of all examples: in turn, or at once.

A CPU keeps one head in its cache, so it takes one after another; an accelerator is filled by all of them only. The
function takes the index of an example and of a head and `[length, dim]` of each array, and returns a tuple of arrays
`[length, dim]`; the arrays are `[batch, length, heads, dim]`, of any lengths and dims, and so are the results. The
first array has all heads; others may have fewer, as keys that several heads of queries share.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def at_once(function: Callable, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    batch, _, heads, _ = arrays[0].shape
    number = jnp.arange(batch * heads)
    example, head, flat = number // heads, number % heads, [x.swapaxes(1, 2) for x in arrays]
    groups = min(x.shape[2] for x in arrays)
    # One vmap over both: another one, for heads that share, would trace everything twice as long.
    each = jax.vmap(function)
    if groups < heads:
        each = jax.vmap(jax.vmap(function, (0, 0, *(0 if x.shape[2] == heads else None for x in arrays))))
        example, head = (x.reshape(batch * groups, -1) for x in (example, head))
        flat = [x.reshape(batch, groups, -1, *x.shape[2:]) if x.shape[1] == heads else x for x in flat]
    found = each(example, head, *(x.reshape(batch * groups, *x.shape[2:]) for x in flat))
    return tuple(x.reshape(batch, heads, *x.shape[-2:]).swapaxes(1, 2) for x in found)


def in_turn(function: Callable, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    batch, _, heads, _ = arrays[0].shape

    def head(n, results):
        example, head = n // heads, n % heads
        found = function(example, head, *(_slice(x, example, head * x.shape[2] // heads) for x in arrays))
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
