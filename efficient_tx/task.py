"""Task and Batch: the only types that the data packages and the trainer share."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

from efficient_tx.checks import one_of

Kind = Literal["tokens", "token_pairs", "image", "token_labels"]

# Example: one unbatched item, {"inputs": int32 [length], "label": int}; pairs also have `inputs2`. All tokens are real,
# whatever their ids. With `own_masks`, the example has a bool "mask" [length] instead. A training example may have a
# second label, `label2`; `mix` in [0, 1] is then the weight of the first label in the loss (mixup).
Example = Mapping[str, Any]

# Batch: {"inputs": int32 [B, L], "mask": bool [B, L], "label": int32, "weight": float32}; label and weight are both
# [B], or both [B, L] for per-token labels. L is max_len; with `bucket` it is a shorter length that fits the batch.
# Pairs also have `inputs2` and `mask2`. With `own_masks` there are `positions`, int32 [B, L]. `label2`, int32 [B], and
# `mix`, float32 [B], are there if the examples have them. Rows of weight 0 only fill up an evaluation batch and do not
# count.
Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Random access to the unpadded examples of one split. Item i is the same in every process and on every call."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss and the metrics of a task, and the number that ranks checkpoints.

    Attributes:
      score: (outputs, batch) -> {"loss": (sum, weight), "accuracy": (sum, weight)}. For the loss, which is minimised,
        and for every metric: the sum over the rows of a batch, and the divisor. `outputs` are the model's, in float32.
        The function is traced: it uses jax.numpy only, and rows of weight 0 must not count.
      metrics: the names in `score` other than "loss".
      best: the name of the number that ranks checkpoints and is compared with the baselines: "loss" or one of
        `metrics`.
      higher_is_better: whether a higher value of `best` is better.
      label_dtype: dtype of the labels in a batch.
    """

    score: Callable[[Any, Mapping[str, Any]], dict[str, tuple[Any, Any]]]
    metrics: tuple[str, ...]
    best: str
    higher_is_better: bool
    label_dtype: str = "int32"

    def __post_init__(self):
        one_of(self.names, best=self.best)

    @property
    def names(self) -> tuple[str, ...]:
        """All names in `score`."""
        return ("loss", *self.metrics)


@dataclasses.dataclass(frozen=True)
class Task:
    """A learning problem: three splits and their properties that a model needs.

    Attributes:
      train, validation, test: the splits, each a random-access source of unpadded examples.
      kind: the form of an example; it decides which models can read it.
      num_classes: number of outputs of a model. Labels are integers in [0, num_classes), unless the objective has
        others.
      vocab_size: token ids are integers in [0, vocab_size); id 0 is the padding. None for real-valued inputs.
      max_len: the largest length of an example. Every batch is padded to it, except with `bucket`.
      image_shape: (height, width, channels) of every image, for the kind "image"; None for other kinds.
      name: the task's short name, a column of the results ("listops").
      source: where the data come from, in words ("generated, seed 0").
      own_masks: each example of one sequence has a mask of its real tokens. Their positions then count all tokens of
        the example; otherwise positions count real tokens only.
      bucket: whether batches hold examples of similar length, padded to a power of two that fits them.
      objective: loss and metrics; None means classification with cross-entropy, ranked by accuracy.
      baselines: scores of trivial answers that a model has to beat, by name, in `objective.best` (accuracy) on this
        test split.
      augment: random augmentation of the training examples, drawn anew each time; its only source of randomness is the
        given generator. None means no augmentation. Evaluation, also on `train`, uses the examples unchanged.
    """

    train: Source
    validation: Source
    test: Source
    kind: Kind
    num_classes: int
    vocab_size: int | None
    max_len: int
    name: str
    source: str
    image_shape: tuple[int, int, int] | None = None
    own_masks: bool = False
    bucket: bool = False
    objective: Objective | None = None
    baselines: Mapping[str, float] = dataclasses.field(default_factory=dict)
    augment: Callable[[Example, np.random.Generator], Example] | None = None


def data_directory(path: str | os.PathLike | None = None) -> pathlib.Path:
    """The data directory: `path` if given, else $EFFICIENT_TX_DATA, else ~/.cache/efficient_tx. Does not create it."""
    return pathlib.Path(path or os.environ.get("EFFICIENT_TX_DATA") or "~/.cache/efficient_tx").expanduser()
