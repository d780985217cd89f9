"""Sentence embeddings of a text encoder, how far two encoders' agree, and what a linear probe reads in them."""

from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from efficient_tx.checks import above_zero, at_least

STEP = 32  # lengths of batches are multiples of it: each length is a program of its own


class Agreement(NamedTuple):
    """How far two encoders' embeddings of the same sentences agree; `str` is a line of it.

    Attributes:
      cosine: mean cosine of a sentence's two embeddings.
      lowest_cosine: that of the sentence where they differ most.
      rank_correlation: Spearman's correlation of the similarities of all pairs of sentences, in one encoder and in the
        other: 1 if both rank them alike. NaN if all pairs are equally similar in one of them.
      pairs: number of these pairs.
    """

    cosine: float
    lowest_cosine: float
    rank_correlation: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"cosine {self.cosine:.4f}, lowest {self.lowest_cosine:.4f}; "
            f"rank correlation of {self.pairs:,} pairs {self.rank_correlation:.4f}"
        )


def embed(model: nnx.Module, inputs: np.ndarray, mask: np.ndarray, *, batch_size: int = 32) -> np.ndarray:
    """The embeddings of many sentences, float32 `[sentences, features]`, some at a time, at evaluation.

    Those of similar length go together, without most of their padding: it takes time and changes no embedding.

    Args:
      model: a module with `embed(inputs, mask=)`, as `Bert`.
      inputs: token ids, int `[sentences, length]`.
      mask: bool `[sentences, length]`, True for real tokens.
      batch_size: sentences at a time.

    Raises:
      ValueError: no sentence, or a mask of another shape.
    """
    at_least(1, batch_size=batch_size)
    if np.shape(inputs) != np.shape(mask) or not np.size(inputs):
        raise ValueError(f"token ids of shape {np.shape(inputs)} with a mask of shape {np.shape(mask)} do not fit")
    graphdef, params = nnx.split(model)
    run = jax.jit(lambda params, inputs, mask: nnx.merge(graphdef, params).embed(inputs, mask=mask))
    count, length = mask.shape
    ends = length - mask[:, ::-1].argmax(axis=1)  # after the last real token
    order = np.argsort(ends, kind="stable")
    order = np.concatenate([order, np.repeat(order[-1:], -count % batch_size)]).reshape(-1, batch_size)
    found: np.ndarray | None = None
    for rows in order:
        end = min(-(-ends[rows].max() // STEP) * STEP, length)
        part = np.asarray(run(params, inputs[rows, :end], mask[rows, :end]))
        found = np.zeros((count, part.shape[1]), part.dtype) if found is None else found
        found[rows] = part
    return found


def agreement(original: np.ndarray, other: np.ndarray) -> Agreement:
    """How far two encoders' embeddings agree, each `[sentences, features]`, of any lengths and numbers of features.

    Raises:
      ValueError: another number of sentences than two or more of each, or an embedding that is zero or not finite; or,
        for the cosines, other numbers of features.
    """
    if original.shape != other.shape or original.ndim != 2 or len(original) < 3:
        raise ValueError(
            f"embeddings of shape {original.shape} and {other.shape}: both must be [sentences, features], of three "
            "sentences at least"
        )
    one, two = (unit(np.asarray(x, np.float64)) for x in (original, other))
    cosines = (one * two).sum(axis=1)
    pairs = np.triu_indices(len(one), k=1)
    return Agreement(
        cosine=float(cosines.mean()),
        lowest_cosine=float(cosines.min()),
        rank_correlation=rank_correlation((one @ one.T)[pairs], (two @ two.T)[pairs]),
        pairs=len(pairs[0]),
    )


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length one. Raises ValueError for one that is zero or not finite."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if (wrong := ~((norms > 0) & (norms < np.inf))).any():
        raise ValueError(f"the embedding of sentence {wrong.argmax()} is zero or not finite")
    return x / norms


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, of `[n]` and `[n]`; NaN if all numbers of one are equal."""
    from scipy.stats import spearmanr  # half a second of imports

    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(spearmanr(x, y).statistic)


def linear_probe(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, *, penalty: float = 0.1
) -> float:
    """Test accuracy of the linear classifier of embeddings that ridge regression gives, a closed form in float64.

    It minimises the mean of ‖W x + b − e_label‖² plus penalty · s · ‖W‖², where s is the mean variance of a feature;
    the largest output is the answer.

    Args:
      train, test: embeddings, `[n, features]`.
      train_labels, test_labels: whole numbers from 0 on, `[n]`.
      penalty: relative weight of the ridge, above 0.

    Raises:
      ValueError: sizes that do not fit, no example, or an embedding that is not finite.
    """
    above_zero(penalty=penalty)
    for x, labels in ((train, train_labels), (test, test_labels)):
        if x.ndim != 2 or not len(x) or np.shape(labels) != (len(x),) or x.shape[1] != train.shape[1]:
            raise ValueError(f"embeddings of shape {x.shape} with labels of shape {np.shape(labels)} do not fit")
        if not np.isfinite(x).all():
            raise ValueError("an embedding is not finite")
    classes = np.eye(1 + int(np.max(train_labels)))[np.asarray(train_labels, int)]
    mean, answer = train.mean(axis=0, dtype=np.float64), classes.mean(axis=0)
    x = train - mean
    ridge = penalty * len(x) * max(x.var(axis=0).mean(), np.finfo(np.float64).tiny) * np.eye(x.shape[1])
    weights = np.linalg.solve(x.T @ x + ridge, x.T @ (classes - answer))
    outputs = (test - mean) @ weights + answer
    return float(np.mean(outputs.argmax(axis=1) == np.asarray(test_labels)))
