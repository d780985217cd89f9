"""Baselines for sequence models: the byte n-grams of a text, without their order.

`accuracy` is that of a classifier, Wang and Manning 2012 ("Baselines and bigrams", NB-SVM), with logistic loss. Every
feature is scaled by its log-count ratio between the classes, which is its weight in naive Bayes. Then a regularised
linear model is fitted. `Similarity` is the cosine of the n-grams of two texts; rarer ones have larger weights.
"""

import functools
from collections.abc import Iterable, Sequence

import numpy as np

ORDERS = (2, 4)
BITS = 18  # features are hashed into 2^18
_MULTIPLIERS = (16777619, 2654435761, 2246822507)
_PENALTY = 0.1
_ITERATIONS = 100


def features(text: bytes) -> np.ndarray:
    """The n-grams of ORDERS that occur in `text`, each once: sorted uint32 `[n]` in [0, 2^BITS)."""
    spread, mix, scramble = map(np.uint32, _MULTIPLIERS)
    letters = np.frombuffer(text, np.uint8).astype(np.uint32) + np.uint32(1)
    keys, found = np.zeros(len(letters), np.uint32), []
    for n in range(1, max(ORDERS) + 1):
        if len(letters) < n:
            break
        keys = keys[: len(letters) - n + 1] * spread ^ letters[n - 1 :]
        if n in ORDERS:
            found.append((keys * mix ^ np.uint32(n)) * scramble >> np.uint32(32 - BITS))
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint32)


def accuracy(train: Sequence[bytes], train_labels: np.ndarray, test: Sequence[bytes], test_labels: np.ndarray) -> float:
    """Test accuracy of the model fitted on `train`; labels are 0 and 1. Takes seconds for some megabytes of text.

    Raises:
      ValueError: the training texts are all of one class.
    """
    import scipy.optimize
    import scipy.sparse
    import scipy.special

    positive = np.asarray(train_labels) == 1
    if positive.all() or not positive.any():
        raise ValueError("n-grams: all training texts are of one class")
    rows = [features(text) for text in train]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    columns, classes = np.concatenate(rows), np.repeat(positive, np.diff(offsets))
    counts = [1.0 + np.bincount(columns[classes == c], minlength=2**BITS) for c in (False, True)]
    ratio = (np.log(counts[1] / counts[1].sum()) - np.log(counts[0] / counts[0].sum())).astype(np.float32)
    values = ratio[columns] / np.repeat([_norm(ratio[row]) for row in rows], np.diff(offsets)).astype(np.float32)
    matrix = scipy.sparse.csr_array((values, columns.astype(np.int32), offsets), (len(rows), 2**BITS))
    sign = np.where(positive, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[:-1].astype(np.float32), parameters[-1]
        margin = sign * (matrix @ weights + bias)
        slope = -sign * scipy.special.expit(-margin)
        gradient = matrix.T @ slope.astype(np.float32) + _PENALTY * weights
        value = np.logaddexp(0.0, -margin).sum() + _PENALTY / 2 * weights @ weights
        return float(value), np.append(gradient, slope.sum()).astype(np.float64)

    start = np.zeros(2**BITS + 1)
    fitted = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": _ITERATIONS}).x
    weights = fitted[:-1] * ratio

    def predict(text: bytes) -> bool:
        row = features(text)
        return weights[row].sum() / _norm(ratio[row]) + fitted[-1] > 0

    return float(np.mean([predict(text) for text in test] == (np.asarray(test_labels) == 1)))


def _norm(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).sum())) or 1.0


class Similarity:
    """The cosine of the n-grams of two texts, each weighted by ln((1 + texts) / (1 + texts that have it)) + 1.

    Args:
      pairs: pairs of texts, in which the texts are counted.
    """

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]):
        having, count = np.zeros(2**BITS), 0
        self._features = functools.lru_cache(maxsize=4096)(features)
        for pair in pairs:
            for text in pair:
                having[self._features(text)] += 1
                count += 1
        self._squares = (np.log((1 + count) / (1 + having)) + 1) ** 2

    def __call__(self, one: bytes, two: bytes) -> float:
        """In [0, 1]; 0 if a text is too short for an n-gram."""
        rows = [self._features(text) for text in (one, two)]
        common = self._squares[np.intersect1d(*rows, assume_unique=True)].sum()
        norms = np.sqrt(np.prod([self._squares[row].sum() for row in rows]))
        return float(common / norms) if norms else 0.0


def threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The t for which scores > t agrees with most of the labels, 0 or 1; it is midway between two different scores."""
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], np.asarray(labels)[order] == 1
    right = np.concatenate([[0], np.cumsum(~positive)]) + positive.sum() - np.concatenate([[0], np.cumsum(positive)])
    edges = np.concatenate([[ordered[0] - 1], (ordered[1:] + ordered[:-1]) / 2, [ordered[-1] + 1]])
    right[1:-1][ordered[1:] == ordered[:-1]] = 0  # no t separates equal scores
    return float(edges[right.argmax()])
