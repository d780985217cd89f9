"""Ranking: what measures tell of the order of methods, learnt from finished runs of other tasks."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from efficient_tx.predict.measures import MEASURES

# Of the interval of a rank.
CONFIDENCE = 0.9
DRAWS = 4000


class Known(NamedTuple):
    """Methods of one task whose runs are finished.

    Attributes:
      task: its name, data and protocol, in words.
      methods: their labels.
      measures: of each, as `measure` gives them.
      final: of each the score at the end; more is better.
    """

    task: str
    methods: Sequence[str]
    measures: Sequence[Mapping[str, Any]]
    final: Sequence[float]


class Learnt(NamedTuple):
    """A predictor of the order of methods.

    Attributes:
      weights: of the MEASURES.
      spread: standard deviation of what it misses on a task that it was not learnt from; 1 of a guess.
    """

    weights: np.ndarray
    spread: float


class Place(NamedTuple):
    """The expected rank of a method, from 1, and its 90 % interval."""

    rank: float
    low: int
    high: int


def standardised(values: Sequence[float | None]) -> np.ndarray:
    """Values among each other: mean 0 and standard deviation 1. What is missing is average, and so are equal values."""
    numbers = np.array([np.nan if x is None else x for x in values], np.float64)
    if np.isnan(numbers).all():
        return np.zeros(len(numbers))
    deviation = np.nanstd(numbers)
    # Equal up to rounding is equal.
    if deviation <= 1e-12 * np.nanmax(np.abs(numbers)):
        return np.zeros(len(numbers))
    return np.nan_to_num((numbers - np.nanmean(numbers)) / deviation)


def features(measures: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """`[methods, measures]`, each measure standardised and turned so that more is taken to be better."""
    columns = [one.sign * standardised([m.get(name) for m in measures]) for name, one in MEASURES.items()]
    return np.stack(columns, axis=1)


def fitted(tasks: Sequence[Known]) -> np.ndarray:
    """Weights of the measures by ridge regression of the standardised final scores.

    They are drawn towards equal ones, which they are without a task; the penalty is the number of methods. So a few
    tasks turn a measure against what it is taken to say only if they agree on it.
    """
    equal = np.full(len(MEASURES), 1 / len(MEASURES))
    if not tasks:
        return equal
    x = np.concatenate([features(task.measures) for task in tasks])
    y = np.concatenate([standardised(task.final) for task in tasks])
    return equal + np.linalg.solve(x.T @ x + len(x) * np.eye(x.shape[1]), x.T @ (y - x @ equal))


def without(tasks: Sequence[Known], left_out: Known) -> list[Known]:
    return [task for task in tasks if task is not left_out]


def learn(tasks: Sequence[Known]) -> Learnt:
    """The predictor from these tasks; what it misses is measured on each with the weights of the others."""
    if len(tasks) < 2:
        return Learnt(fitted(tasks), 1.0)
    missed = [standardised(t.final) - features(t.measures) @ fitted(without(tasks, t)) for t in tasks]
    return Learnt(fitted(tasks), float(np.sqrt(np.mean(np.concatenate(missed) ** 2))))


def places(learnt: Learnt, measures: Sequence[Mapping[str, Any]]) -> list[Place]:
    """The ranks of methods; those whose short run was not finite come last.

    What the predictor misses is drawn from a normal distribution, for each method by itself.
    """
    scores = features(measures) @ learnt.weights
    draws = scores + learnt.spread * np.random.default_rng(0).standard_normal((DRAWS, len(scores)))
    draws[:, [bool(one.get("fault")) for one in measures]] = -np.inf
    ranks = stats.rankdata(-draws, method="average", axis=1)
    low, high = np.quantile(ranks, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return [Place(*found) for found in zip(ranks.mean(0).tolist(), np.floor(low).astype(int).tolist(),
                                           np.ceil(high).astype(int).tolist())]  # fmt: skip


def spearman(predicted: Sequence[float], final: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where all of one side are equal."""
    if len(np.unique(predicted)) < 2 or len(np.unique(final)) < 2:
        return None
    return float(stats.spearmanr(predicted, final).statistic)


def scored(tasks: Sequence[Known]) -> dict[str, list[float | None]]:
    """Spearman's correlation with the final order, for each task: "all", of the other tasks' weights; each measure."""
    result = {"all": [spearman(features(t.measures) @ fitted(without(tasks, t)), t.final) for t in tasks]}
    for at, name in enumerate(MEASURES):
        result[name] = [spearman(features(t.measures)[:, at], t.final) for t in tasks]
    return result
