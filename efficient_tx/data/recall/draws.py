"""Random draws from `Generator.random` alone, the only stream that NumPy keeps the same over its versions."""

import numpy as np


def integers(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """`count` independent uniform integers in [low, high), int32."""
    return (low + np.floor((high - low) * rng.random(count))).astype(np.int32)


def distinct(rng: np.random.Generator, low: int, high: int, count: int) -> np.ndarray:
    """`count` different integers in [low, high), in random order: every such sequence is equally likely."""
    if high - low < 8 * count**2:
        return low + _smallest(rng.random(high - low), count)
    while True:  # few of many: draw again if two are equal, at most one time in 16
        chosen = integers(rng, low, high, count)
        if len(np.unique(chosen)) == count:
            return chosen


def weighted_distinct(rng: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """`count` different indices, int64, drawn one after the other with the weights of those that are left.

    Takes the first of exponential clocks with these rates (Efraimidis and Spirakis 2006).
    """
    return _smallest(-np.log1p(-rng.random(len(weights))) / weights, count)


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` smallest values, smallest first."""
    if count < len(values):
        places = np.argpartition(values, count)[:count]
        return places[np.argsort(values[places], kind="stable")]
    return np.argsort(values, kind="stable")
