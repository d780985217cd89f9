"""What the variants are measured on: families of queries, keys and values, and the arguments of each function."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.attention import Mixer

# Shares of the clusters that tokens come from.
CLUSTERED = (1 / 8,) * 8
IMBALANCED = (0.96, 0.01, 0.01, 0.01, 0.01)
SPREAD = 0.3


def random(rng: np.random.Generator, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Independent standard normal entries: weights close to uniform, the values of a row nearly cancel."""
    return [rng.normal(size=shape) for _ in range(3)]


def clusters(rng: np.random.Generator, shape: tuple[int, ...], shares: tuple[float, ...]) -> list[np.ndarray]:
    """Tokens near a few centres, which queries and keys share, so that a query finds the keys of its own cluster."""
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


# What functions require beside q, k and v, by the name of the argument: (q, budget, rng) -> value.
REQUIRED: dict[str, Callable[[jax.Array, int, np.random.Generator], Any]] = {
    "k2": lambda q, budget, rng: rng.normal(size=q.shape).astype(np.float32),
    "v2": lambda q, budget, rng: rng.normal(size=q.shape).astype(np.float32),
    "log_decay": lambda q, budget, rng: (-np.abs(rng.normal(size=q.shape)) / 16).astype(np.float32),
    "e": lambda q, budget, rng: (rng.normal(size=(budget, q.shape[1])) / q.shape[1] ** 0.5).astype(np.float32),
    "f": lambda q, budget, rng: (rng.normal(size=(budget, q.shape[1])) / q.shape[1] ** 0.5).astype(np.float32),
    "bias": lambda q, budget, rng: -math.log(q.shape[1]),
    "max_len": lambda q, budget, rng: q.shape[1],
}


def arguments(
    name: str, variant: type[Mixer], given: dict[str, jax.Array], budget: int
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """The arguments of a variant's function, but for mask and key.

    Args:
      name: of the variant, for the error.
      variant: a mixer with a `function`.
      given: q, k and v.
      budget: keys, landmarks or features that a query may meet.

    Returns:
      Arrays, which have gradients, and options, which are static.

    Raises:
      ValueError: the function requires an argument that `REQUIRED` does not know.
    """
    known = inspect.signature(variant.function).parameters
    options = {option: value for option, value in variant.within(budget).items() if option in known}
    arrays = {argument: given[argument] for argument in known if argument in given}
    rng = np.random.default_rng(1)
    for argument, parameter in known.items():
        if argument in arrays or argument in options or parameter.default is not inspect.Parameter.empty:
            continue
        if argument not in REQUIRED:
            raise ValueError(
                f"{name} requires {argument!r}: say in efficient_tx/compare/inputs.py what it is measured with"
            )
        value = REQUIRED[argument](given["q"], budget, rng)
        if isinstance(value, np.ndarray):
            arrays[argument] = jnp.asarray(value)
        else:
            options[argument] = value
    return arrays, options


def shared(function: Callable, of: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments `of` that `function` takes."""
    known = inspect.signature(function).parameters
    return {argument: value for argument, value in of.items() if argument in known}
