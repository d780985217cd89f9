"""Inputs of the measurements: families of queries, keys and values, and the arguments of each function."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.attention import Mixer

# The share of tokens in each cluster.
CLUSTERED = (1 / 8,) * 8
IMBALANCED = (0.96, 0.01, 0.01, 0.01, 0.01)
SPREAD = 0.3


def random(rng: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Independent standard normal entries: weights are close to uniform, and the values of a row nearly cancel."""
    return [rng.normal(size=shape) for _ in range(3)]


def clusters(rng: np.random.Generator, shape: tuple[int, ...], shares: tuple[float, ...]) -> list[np.ndarray]:
    """Tokens near a few centres that queries and keys share, so that a query finds the keys of its own cluster."""
    batch, length, heads, dim = shape
    label = rng.choice(len(shares), (batch, length), p=shares)
    shared, values = rng.normal(size=(2, batch, len(shares), heads, dim))
    centres = [shared, shared, values]
    rows = np.arange(batch)[:, None]
    return [centre[rows, label] + SPREAD * rng.normal(size=shape) for centre in centres]


FAMILIES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], list[np.ndarray]]] = {
    "random": random,
    "clustered": lambda rng, shape: clusters(rng, shape, CLUSTERED),
    "imbalanced": lambda rng, shape: clusters(rng, shape, IMBALANCED),
}


def tokens(family: str, batch: int, length: int, heads: int, head_dim: int, *, seed: int = 0) -> dict[str, jax.Array]:
    """q, k and v of a family, float32 `[batch, length, heads, head_dim]` each."""
    arrays = FAMILIES[family](np.random.default_rng(seed), (batch, length, heads, head_dim))
    return {name: jnp.asarray(array, jnp.float32) for name, array in zip("qkv", arrays)}


def arguments(
    variant: type[Mixer], given: dict[str, jax.Array], budget: int
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The arguments of a variant's function, except mask and key.

    Args:
      variant: a mixer whose `function` takes projections.
      given: q, k and v.
      budget: keys, landmarks or features that a query may meet.

    Returns:
      Arrays, which have gradients, and options, which are static.

    Raises:
      ValueError: the function requires an argument for which there is no value.
    """
    known = inspect.signature(variant.function).parameters
    options = {option: value for option, value in variant.within(budget).items() if option in known}
    rng = np.random.default_rng(1)
    # Other projections of the tokens are drawn like queries.
    arrays = {
        name: given[name] if name in given else rng.normal(size=given["q"].shape).astype(np.float32)
        for name in known
        if name in (*given, *variant.projections) and known[name].default is inspect.Parameter.empty
    }
    for name, value in variant.measured_with(given["q"], budget, rng).items():
        (arrays if isinstance(value, np.ndarray) else options)[name] = value
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in arrays and name not in options:
            raise ValueError(
                f"{variant.__name__} requires {name!r}: let its `measured_with` say what it is measured with"
            )
    return {name: jnp.asarray(array) for name, array in arrays.items()}, options


def shared(function: Callable, of: dict[str, Any]) -> dict[str, Any]:
    """The arguments in `of` that `function` takes."""
    known = inspect.signature(function).parameters
    return {argument: value for argument, value in of.items() if argument in known}
