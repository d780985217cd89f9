"""Task and Batch: the only types that the data packages and the trainer share."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np

Kind = Literal["tokens", "token_pairs", "image", "token_labels"]

# Example: one unbatched item, {"inputs": int32 [length], "label": int}; `inputs2` beside it for pairs. All its tokens
# are real, whatever their values, unless the task has `own_masks`: then it brings a bool "mask" [length]. One for
# training may have a second label, `label2`, and the share `mix` in [0, 1] of the loss that is the first one's (mixup).
Example = Mapping[str, Any]

# Batch: {"inputs": int32 [B, L], "mask": bool [B, L], "label": int32, "weight": float32}; label and weight are both
# [B], or both [B, L] for per-token labels. L is max_len, or under `bucket` a shorter length that fits the batch.
# `inputs2` and `mask2` are there for pairs, `positions` int32 [B, L] under `own_masks`, `label2` int32 and `mix`
# float32, both [B], where the examples have them.
# weight 0 marks what only fills up the batch (padding of an evaluation batch), so that it counts nowhere.
Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Random access to the examples of one split, unpadded. Item i is the same in every process and on every call."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a model of a task is trained for, and by which number its checkpoints are ranked.

    Attributes:
      score: (outputs, batch) -> {"loss": (sum, weight), "accuracy": (sum, weight)}: of the loss, which is minimised,
        and of every metric the sum over the rows of a batch and what it is divided by. Outputs are the model's, in
        float32. It is traced: jax.numpy only, and rows of weight 0 count nowhere.
      metrics: the names in `score` beside "loss".
      best: the name that ranks checkpoints and is compared with the baselines; "loss" or one of `metrics`.
      higher_is_better: which way.
      label_dtype: of the labels in a batch.
    """

    score: Callable[[Any, Mapping[str, Any]], dict[str, tuple[Any, Any]]]
    metrics: tuple[str, ...]
    best: str
    higher_is_better: bool
    label_dtype: str = "int32"

    @property
    def names(self) -> tuple[str, ...]:
        """All that `score` gives."""
        return ("loss", *self.metrics)


@dataclasses.dataclass(frozen=True)
class Task:
    """A learning problem: three splits and what a model has to know of them.

    Attributes:
      train, validation, test: the splits, random-access sources of unpadded examples.
      kind: what an example looks like, and so which model reads it.
      num_classes: labels are integers in [0, num_classes), unless the objective has others; so many outputs a model
        has.
      vocab_size: token ids are integers in [0, vocab_size); id 0 is the padding. None for real-valued inputs.
      max_len: the longest example; every batch is padded to it, but under `bucket`.
      image_shape: (height, width, channels) of every image, for the kind "image"; None for the others.
      name: the task's short name, a column of the results ("listops").
      source: where the data come from, in words ("generated, seed 0").
      own_masks: examples of one sequence say themselves which of their tokens are real. These keep their places: their
        positions count the others too, where otherwise they count the real tokens only.
      bucket: batches hold examples of similar length and are padded to a power of two that fits them.
      objective: what a model is trained for; None is classification by cross-entropy, ranked by accuracy.
      baselines: what answers that a model has to beat score in `objective.best` (accuracy), by name, on this very test
        split.
      augment: what training makes of an example of `train` each time it comes up, drawing from the generator it is
        given and from nothing else; None = nothing. Evaluation, of `train` too, sees the examples as they are.
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
    """Where data live: `path` when given, else $EFFICIENT_TX_DATA, else ~/.cache/efficient_tx. Not created here."""
    return pathlib.Path(path or os.environ.get("EFFICIENT_TX_DATA") or "~/.cache/efficient_tx").expanduser()
