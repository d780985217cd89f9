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
    """The difference of two methods: a paired bootstrap over items, and Student's t over the seeds of each.

    The same items are drawn for both methods, whose runs stay: that is the variance of other test items. To it comes
    the variance of each mean over seeds, s² / n: a bootstrap over a few seeds would understate it. The degrees of
    freedom are those of Welch and Satterthwaite, without end for the items. A method with one seed adds nothing: then
    the interval says nothing of other seeds. What items and seeds share counts in both, to the safe side.

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
        drawn = [np.mean([(weights @ sums) / (weights @ counts) for sums, counts in runs], axis=0)
                 for runs in (one, other)]  # fmt: skip
        differences.append(drawn[0] - drawn[1])
    scores = [np.array([sums.sum() / counts.sum() for sums, counts in runs]) for runs in (one, other)]
    mean = float(scores[0].mean() - scores[1].mean())
    of_seeds = [(of.var(ddof=1) / len(of), len(of) - 1) for of in scores if len(of) > 1]
    variance = float(np.concatenate(differences).var() + sum(v for v, _ in of_seeds))
    if variance == 0:  # never a probability of 0: so many resamples show no more
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 1 / (1 + resamples))
    doubt = sum(v**2 / freedom for v, freedom in of_seeds)
    student = stats.t(variance**2 / doubt if doubt else np.inf)
    half = float(student.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    return Difference(mean, mean - half, mean + half, float(2 * student.sf(abs(mean) / math.sqrt(variance))))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities adjusted for as many comparisons (Holm 1979): reject where at most 0.05."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    adjusted, least = [0.0] * len(probabilities), 0.0
    for rank, index in enumerate(order):
        least = max(least, min(1.0, (len(probabilities) - rank) * probabilities[index]))
        adjusted[index] = least
    return adjusted
