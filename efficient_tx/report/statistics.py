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


Runs = Sequence[tuple[np.ndarray, np.ndarray]]


def paired(methods: Sequence[Runs], other: Runs, *, resamples: int = RESAMPLES, seed: int = 0) -> list[Difference]:
    """The differences of methods to another one: a paired bootstrap over items, and Student's t over the seeds of each.

    The same items are drawn for all methods, whose runs stay: that is the variance of other test items. To it comes
    the variance of each mean over seeds, s² / n: a bootstrap over a few seeds would understate it. The degrees of
    freedom are those of Welch and Satterthwaite, without end for the items. A method with one seed adds nothing: then
    the interval says nothing of other seeds. What items and seeds share counts in both, to the safe side.

    Args:
      methods, other: for each run of a method the sums and the divisors of all items, `[items]`, in one order; a run's
        score is Σ sums / Σ divisors.
    """
    *drawn, against = resampled([*methods, other], resamples, seed)
    return [difference(runs, other, float((scores - against).var()), resamples) for runs, scores in zip(methods, drawn)]


def resampled(methods: Sequence[Runs], resamples: int, seed: int) -> np.ndarray:
    """The mean score of each method's runs on the same drawn items, `[methods, resamples]`."""
    generator = np.random.default_rng(seed)
    items = len(methods[0][0][0])
    found = []
    for start in range(0, resamples, CHUNK):
        weights = generator.multinomial(items, np.full(items, 1 / items), size=min(CHUNK, resamples - start))
        found.append([np.mean([(weights @ sums) / (weights @ counts) for sums, counts in runs], 0) for runs in methods])
    return np.concatenate(found, axis=1)


def difference(one: Runs, other: Runs, of_items: float, resamples: int) -> Difference:
    """Of two methods; `of_items` is the variance of their difference over so many resamples of the items."""
    scores = [np.array([sums.sum() / counts.sum() for sums, counts in runs]) for runs in (one, other)]
    mean = float(scores[0].mean() - scores[1].mean())
    of_seeds = [(of.var(ddof=1) / len(of), len(of) - 1) for of in scores if len(of) > 1]
    variance = float(of_items + sum(v for v, _ in of_seeds))
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
