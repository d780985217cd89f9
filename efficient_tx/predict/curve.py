"""Extrapolation of a learning curve: what the training loss will be, and how little of that is known."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Of the law's exponent.
EXPONENTS = (0.05, 3.0)
# Values of the floor in the grid, and of the knee and the exponent.
FLOORS, SHAPES = 48, 96
# Losses are averaged over parts, as long as their time is old: at most so many.
PARTS = 200
TAILS = (0.05, 0.5, 0.95)


class Forecast(NamedTuple):
    """The median of what a loss may be, and its 90 % interval."""

    low: float
    median: float
    high: float


def extrapolate(losses: Sequence[float], steps: int) -> Forecast:
    """The loss of step `steps`, from those of the first ones.

    The law is L(t) = c + a (1 + t / τ)^-b with a, c ≥ 0. Its posterior is computed on a grid: c up to the mean loss
    seen, τ from 1 to `steps` and b, both in equal ratios, all alike before; a by least squares; and normal noise whose
    deviation is unknown, so that the likelihood is SSE^(-(n - 2) / 2) of n losses. It is meant for noise as of batches:
    of much less, the grid is coarser than what could be known. A Bayesian extrapolation of learning curves is that of
    Domhan, Springenberg and Hutter (2015, IJCAI), here with one law in place of eleven.

    Args:
      losses: of the steps 1, 2, ..., finite and not negative.
      steps: at least as many.
    """
    seen = np.asarray(losses, np.float64)
    edges = np.unique(np.geomspace(1, len(seen) + 1, PARTS + 1).round().astype(int)) - 1
    counts = np.diff(edges)
    values, time = (np.add.reduceat(x, edges[:-1]) / counts for x in (seen, np.arange(1.0, len(seen) + 1)))
    knees, exponents = np.geomspace(1, max(steps, 2), SHAPES)[:, None], np.geomspace(*EXPONENTS, SHAPES)

    def shapes(at: np.ndarray) -> np.ndarray:
        """Of the law at some times, `[times, knees × exponents]`."""
        return ((1 + np.reshape(at, (-1, 1, 1)) / knees) ** -exponents).reshape(np.size(at), -1)

    floors = np.linspace(0, seen.mean(), FLOORS)
    over, curves = values - floors[:, None], shapes(time)
    products, squares = (counts * over) @ curves, counts @ curves**2
    # Differences of large numbers leave rounding where a fit is perfect.
    rounding = np.finfo(float).eps * np.sum(seen**2) + np.finfo(float).tiny
    left = np.maximum((over**2 @ counts)[:, None] - products**2 / squares, 0) + rounding
    logs = -max(0, len(values) - 2) / 2 * np.log(left)
    weights = np.exp(logs - logs.max()).ravel()
    found = (floors[:, None] + products / squares * shapes(steps)).ravel()
    order = np.argsort(found, kind="stable")
    shares = np.cumsum(weights[order]) / weights.sum()
    return Forecast(*found[order][np.minimum(np.searchsorted(shares, TAILS), len(order) - 1)].tolist())
