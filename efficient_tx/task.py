"""Task and Batch: the only types that the data packages and the trainer share."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

import numpy as np

from efficient_tx.checks import one_of
from efficient_tx.files import local_path

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

# Entries of a batch that a model does not get.
NOT_READ = ("label", "label2", "mix", "weight", "row", "seed", "item")


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a batch that a model gets, by name: all that are not in NOT_READ."""
    return {name: array for name, array in batch.items() if name not in NOT_READ}


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
        try:
            kind = np.dtype(self.label_dtype).kind
        except TypeError:
            kind = None
        if kind not in ("i", "u", "f"):
            raise ValueError(f"label_dtype is {self.label_dtype!r}: labels are numbers, as int32 or float32")

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
      symbols: what each token id stands for, `vocab_size` texts by id, to show tokens to people. None shows ids.
      augment: random augmentation of the training examples, drawn anew each time; its only source of randomness is the
        given generator. None means no augmentation. Evaluation, also on `train`, uses the examples unchanged.

    Raises:
      ValueError: a size is no whole number above 0, or another attribute is not what is said of it here.
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
    symbols: Sequence[str] | None = None
    augment: Callable[[Example, np.random.Generator], Example] | None = None

    def __post_init__(self):
        one_of(get_args(Kind), kind=self.kind)
        sizes = {"num_classes": self.num_classes, "max_len": self.max_len}
        if self.vocab_size is not None:
            sizes["vocab_size"] = self.vocab_size
        if self.image_shape is not None:
            if not isinstance(self.image_shape, tuple) or len(self.image_shape) != 3:
                raise ValueError(f"image_shape is {self.image_shape!r}: it must be (height, width, channels)")
            sizes |= zip(("image height", "image width", "image channels"), self.image_shape)
        for name, value in sizes.items():
            if not isinstance(value, int | np.integer) or not 0 < value < 2**31:
                raise ValueError(f"{name} is {value!r}: it must be a whole number above 0 and below 2^31")
        for name, text in {"name": self.name, "source": self.source}.items():
            if not isinstance(text, str):
                raise ValueError(f"{name} is {text!r}: it must be a string")
        if not isinstance(self.objective, Objective | None):
            raise ValueError(f"objective is {self.objective!r}: it must be an efficient_tx.task.Objective")
        if not isinstance(self.baselines, Mapping):
            raise ValueError(f"baselines is {self.baselines!r}: it must be a dict of scores by name")
        for name, score in self.baselines.items():
            if not isinstance(score, int | float | np.number) or not np.isfinite(score):
                raise ValueError(f"the baseline {name!r} is {score!r}: it must be a finite number")
        if self.symbols is not None:
            if isinstance(self.symbols, str) or not isinstance(self.symbols, Sequence):
                raise ValueError(f"symbols is {self.symbols!r}: it must be a list of texts, one for each token id")
            if wrong := [symbol for symbol in self.symbols if not isinstance(symbol, str)]:
                raise ValueError(f"the symbol {wrong[0]!r} is no text")
            if len(self.symbols) != self.vocab_size:
                raise ValueError(f"there are {len(self.symbols)} symbols: vocab_size is {self.vocab_size}")


def check_sizes(kind: str, sizes: Any) -> None:
    """Raises ValueError unless `sizes`, of a module whose KIND is `kind`, has what a model needs and a Task knows."""
    needed = ["num_classes", "vocab_size", "max_len", *["image_shape"] * (kind == "image")]
    if not isinstance(sizes, Mapping):
        raise ValueError(f"sizes() gives {sizes!r}, not a dict of {', '.join(needed)}")
    for name in needed:
        if sizes.get(name) is None and (name, kind) != ("vocab_size", "image"):
            raise ValueError(f"sizes() gives no {name}, which a model for the kind {kind!r} needs")
    if unknown := sizes.keys() - {field.name for field in dataclasses.fields(Task)}:
        raise ValueError(f"sizes() gives {min(unknown)!r}, which no task has: it gives {', '.join(needed)}")


def data_directory(path: str | os.PathLike | None = None) -> pathlib.Path:
    """The data directory: `path` if given, else $EFFICIENT_TX_DATA, else ~/.cache/efficient_tx. Does not create it.

    Raises:
      ValueError: as `local_path`.
    """
    return local_path(path or os.environ.get("EFFICIENT_TX_DATA") or "~/.cache/efficient_tx")
