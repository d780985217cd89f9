"""Recall and state tracking, generated: what tells token mixers apart within minutes.

    mqar    multi-query associative recall       copy    selective copying       needle  one fact in a long text
    parity  of the bits so far                   count   of a token so far

Every example has `max_len` tokens; labels are per token, and only where a question is does the weight differ from 0.
They can be learnt causally and in both directions: no answer follows its question in the inputs, unless by chance.
"""

import collections
import dataclasses

import numpy as np

from efficient_tx.checks import OptionError, at_least
from efficient_tx.data.recall.counting import Count, Parity
from efficient_tx.data.recall.kind import Kind
from efficient_tx.data.recall.mqar import Mqar
from efficient_tx.data.recall.needle import Needle
from efficient_tx.data.recall.selective_copy import SelectiveCopy
from efficient_tx.task import Task

KIND = "token_labels"
KINDS: dict[str, type[Kind]] = {"mqar": Mqar, "copy": SelectiveCopy, "needle": Needle, "parity": Parity, "count": Count}


def sizes(*, kind: str = "mqar", max_len: int = 64, **options) -> dict[str, int]:
    """What a model has to know of the task, from the options of `get_task` alone; errors as there."""
    made = make(kind, max_len, options)
    return {"num_classes": made.num_classes, "vocab_size": made.vocab_size, "max_len": max_len}


def get_task(
    *,
    data_dir: str | None = None,
    kind: str = "mqar",
    max_len: int = 64,
    vocab_size: int | None = None,
    pairs: int | None = None,
    gap_power: float | None = None,
    noise: bool | None = None,
    tokens: int | None = None,
    needles: int | None = None,
    modulus: int | None = None,
    train_size: int = 100_000,
    val_size: int = 1000,
    test_size: int = 3000,
    seed: int = 0,
) -> Task:
    """The task of one of the KINDS, whose class says what its options mean; one left out has the default there.

    Example i of a split is a function of (seed, split, i), made when it is asked for: nothing is stored, and a split
    may have any size.

    Args:
      data_dir: unused, nothing is stored.
      kind: of KINDS.
      max_len: tokens of every example.
      vocab_size: all kinds but "parity".
      pairs, gap_power, noise: "mqar".
      tokens: "copy".
      needles: "needle".
      modulus: "count".
      train_size, val_size, test_size: number of examples.
      seed: of the generator, at least 0.

    Raises:
      ValueError: no such kind, an option of another kind, or one out of its range.
    """
    del data_dir
    options = {
        "vocab_size": vocab_size, "pairs": pairs, "gap_power": gap_power, "noise": noise, "tokens": tokens,
        "needles": needles, "modulus": modulus,
    }  # fmt: skip
    made = make(kind, max_len, options)
    at_least(1, train_size=train_size, val_size=val_size, test_size=test_size)
    at_least(0, seed=seed)
    splits = [Examples(made, seed, split, count) for split, count in enumerate((train_size, val_size, test_size))]
    return Task(
        *splits,
        kind=KIND,
        **sizes(kind=kind, max_len=max_len, **options),
        name=kind,
        source=f"generated, seed {seed}",
        baselines={"constant": constant(splits[-1]), **made.guess()},
    )


class Examples:
    """`count` examples of one split, a random-access source; each is made anew at every access."""

    def __init__(self, kind: Kind, seed: int, split: int, count: int):
        self.kind, self.seed, self.split, self.count = kind, seed, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """{"inputs": int32, "label": int32, "weight": float32}, `[max_len]` each. IndexError outside [0, len)."""
        if not 0 <= index < self.count:
            raise IndexError(f"example {index} of {self.count}")
        seeds = np.random.SeedSequence(self.seed, spawn_key=(self.split, index))
        return self.kind.example(np.random.Generator(np.random.PCG64(seeds)))


def make(kind: str, max_len: int, options: dict) -> Kind:
    """The generator of a kind, with those of `options` that are not None and belong to any kind."""
    if kind not in KINDS:
        raise OptionError("kind", kind, f"choose one of {', '.join(KINDS)}")
    known = {name: [field.name for field in dataclasses.fields(KINDS[name])] for name in KINDS}
    given = {}
    for key, value in options.items():
        owners = [repr(name) for name in KINDS if key in known[name]]
        if value is None or not owners:
            continue
        if key not in known[kind]:
            raise ValueError(
                f"{key} is {value}, an option of kind {' and '.join(owners)}: {kind!r} has {', '.join(known[kind])}"
            )
        given[key] = value
    return KINDS[kind](max_len=max_len, **given)


def constant(split: Examples) -> float:
    """Accuracy of the best constant answer on this split."""
    counts = collections.Counter()
    for index in range(len(split)):
        example = split[index]
        counts.update(example["label"][example["weight"] > 0].tolist())
    return max(counts.values()) / counts.total()
