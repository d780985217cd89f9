"""Statistics of a comparison: mean and interval over seeds, and paired differences over the items of a test split."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
CHUNK = 500


class Spread(NamedTuple):
    """Of the scores of several seeds.

    Attributes:
      count: of seeds.
      mean: of the scores.
      deviation: standard deviation, divisor n − 1; None of one seed.
      low, high: 95 % interval of the mean by Student's t, for seeds drawn from a normal distribution; None of one.
    """

    count: int
    mean: float
    deviation: float | None
    low: float | None
    high: float | None


def spread(scores: Sequence[float]) -> Spread:
    """Of at least one score."""
    mean, n = math.fsum(scores) / len(scores), len(scores)
    if n == 1:
        return Spread(1, mean, None, None, None)
    deviation = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (n - 1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n)
    return Spread(n, mean, deviation, mean - half, mean + half)


class Difference(NamedTuple):
    """Of two methods on the same test items.

    Attributes:
      mean: score of the one minus that of the other.
      low, high: 95 % interval.
      p: probability of so large a difference in either direction, if there were none.
    """

    mean: float
    low: float
    high: float
    p: float


def paired(
    one: Sequence[tuple[np.ndarray, np.ndarray]],
    other: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """The difference of two methods, by a bootstrap over items, and over seeds where a method has several.

    The same items are drawn for both methods: they are paired. The runs of each are drawn by themselves: they are not.
    With one run of each, the interval is that of these two runs, and says nothing of other seeds.

    Args:
      one, other: for each run of a method the sums and the divisors of all items, `[items]`, in one order; a run's
        score is Σ sums / Σ divisors.
    """
    generator = np.random.default_rng(seed)
    items = len(one[0][0])
    differences = []
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights = generator.multinomial(items, np.full(items, 1 / items), size=size)
        scores = []
        for runs in (one, other):
            drawn = np.stack([(weights @ sums) / (weights @ counts) for sums, counts in runs])  # [runs, size]
            chosen = generator.integers(len(runs), size=(len(runs), size))
            scores.append(np.take_along_axis(drawn, chosen, 0).mean(0))
        differences.append(scores[0] - scores[1])
    drawn = np.concatenate(differences)
    mean = float(np.mean([s.sum() / c.sum() for s, c in one]) - np.mean([s.sum() / c.sum() for s, c in other]))
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    # At least one resample more extreme: a probability is never 0.
    tail = (1 + min((drawn <= 0).sum(), (drawn >= 0).sum())) / (1 + resamples)
    return Difference(mean, float(low), float(high), float(min(1.0, 2 * tail)))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities adjusted for as many comparisons (Holm 1979): reject where at most 0.05."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    adjusted, least = [0.0] * len(probabilities), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(probabilities) - rank) * probabilities[index]))
        adjusted[index] = least
    return adjusted
