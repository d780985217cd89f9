"""How far approximations are from exact attention on the queries, keys and values of a trained model, head by head."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.attention import ATTENTION, Mixer
from efficient_tx.compare.attention.inputs import shared
from efficient_tx.compare.attention.measure import DRAWS, counterpart
from efficient_tx.inspect.captured import Call

TARGETS = (0.01, 0.05, 0.1)
# An argument that adds a convolution of the values to what attention gives, no part of the approximation; and the
# option of the class that sets its size.
ADDED, ADDED_SIZE = "conv", "value_conv"
# Of the sketch for ranks, as a multiple of the largest rank that it tells.
SKETCH = 4


def exact_out(call: Call) -> jax.Array | None:
    """What exact attention gives in place of a call, `[batch, length, heads, dim]`; None without a counterpart."""
    exact = exact_of(call)
    return None if exact is None else program(exact, static(exact, call))(shared(exact, call.arrays))


def exact_of(call: Call) -> Callable | None:
    """The exact function that a mixer approximates or is; None if there is none, or it takes other arrays."""
    exact = counterpart(call.variant)
    return exact if exact is not None and takes(exact, call) else None


def takes(function: Callable, call: Call) -> bool:
    """Whether the arrays and options of a call are all that a function requires."""
    required = {name for name, p in inspect.signature(function).parameters.items() if p.default is p.empty}
    return required <= {*call.arrays, *call.options}


def approximations(call: Call) -> list[str]:
    """The variants with a budget that approximate what a call computes exactly."""
    exact = exact_of(call)
    return [
        name
        for name, variant in ATTENTION.items()
        if exact is not None and variant.exact is exact and budgeted(variant, 64) and takes(variant.function, call)
    ]


def budgeted(variant: type[Mixer], budget: int) -> dict[str, Any]:
    """The options of the variant's function within a budget."""
    return shared(variant.function, variant.within(budget))


def errors(call: Call, expected: jax.Array, variant: type[Mixer], size: int | None = None) -> np.ndarray | None:
    """‖out − exact‖ / ‖exact‖ over the real tokens, `[heads]`, a mean over draws.

    Args:
      call: gives the arrays, and the options if it is of this variant; else these are the defaults.
      expected: what `exact_out` gives.
      variant: the approximation.
      size: its budget; None: as the call has it.

    Returns:
      None if the variant cannot have this budget.
    """
    function = variant.function
    given = dict(static(function, call) if call.variant is variant else ())
    given |= shared(function, {name: call.options[name] for name in ("causal", "max_len") if name in call.options})
    given |= {} if size is None else budgeted(variant, size)
    arrays = {name: array for name, array in shared(function, call.arrays).items() if name != ADDED}
    given = {name: value for name, value in given.items() if name not in arrays and name != ADDED}
    try:
        run = program(function, tuple(given.items()))
        keys = [jax.random.split(jax.random.key(draw), len(expected)) for draw in range(DRAWS)]
        outs = [run(arrays, key) for key in keys] if variant.draws else [run(arrays)]
    except ValueError:
        return None
    return np.mean([np.asarray(relative(out, expected, call.real)) for out in outs], axis=0)


def static(function: Callable, call: Call) -> tuple[tuple[str, Any], ...]:
    """The options of a call that a function takes, without the key."""
    return tuple((name, value) for name, value in shared(function, call.options).items() if name != "key")


@functools.cache
def program(function: Callable, options: tuple[tuple[str, Any], ...]) -> Callable[..., jax.Array]:
    """(arrays, key) -> a function of them, compiled once for all layers of the same sizes."""

    @jax.jit
    def run(arrays: Mapping[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
        return function(**arrays, **dict(options), **({} if key is None else {"key": key}))

    return run


@jax.jit
def relative(out: jax.Array, expected: jax.Array, real: jax.Array) -> jax.Array:
    """‖out − expected‖ / ‖expected‖ of each head, `[heads]`, over the real tokens; 0 / 0 is 0."""
    off, whole = (
        jnp.sqrt(jnp.sum(jnp.where(real[..., None, None], x, 0).astype(jnp.float32) ** 2, axis=(0, 1, 3)))
        for x in (out - expected, expected)
    )
    return jnp.where(off == 0, 0, off / jnp.where(whole == 0, 1, whole))


def smallest(sizes: Sequence[int], found: Sequence[np.ndarray | None], target: float) -> list[int | None]:
    """For each head the smallest size from which on no measured error exceeds the target; None: not the largest one."""
    measured = [(size, errors) for size, errors in zip(sizes, found) if errors is not None]
    result: list[int | None] = [None] * (len(measured[0][1]) if measured else 0)
    for size, errors in reversed(measured):
        for head in range(len(errors)):
            after = [later[head] for other, later in measured if other >= size]
            if all(later <= target for later in after):  # a NaN is above all targets
                result[head] = size
    return result


def default_sizes(length: int) -> list[int]:
    """Powers of two from 4 to the length."""
    return [2**i for i in range(2, max(length, 4).bit_length()) if 2**i <= max(length, 4)]
