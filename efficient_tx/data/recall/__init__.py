"""Recall and state tracking: generated tasks that separate token mixers within minutes.

    mqar    multi-query associative recall       copy    selective copying       needle  one fact in a long text
    parity  of the bits so far                   count   of a token so far

Every example has `max_len` tokens. Labels are per token; all tokens except questions have weight 0. The tasks can be
learnt causally and in both directions: no answer follows its question in the inputs, except by chance.
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
    """The sizes that a model needs to know of the task, from the options of `get_task` alone; raises as that does."""
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
    """The task of one of the KINDS, whose class documents its options; an option that is None has the default there.

    Example i of a split is a function of (seed, split, i) and is made on access. Nothing is stored, and a split may
    have any size.

    Args:
      data_dir: unused, nothing is stored.
      kind: a key of KINDS: "mqar", "copy", "needle", "parity" or "count".
      max_len: tokens of every example.
      vocab_size: number of token ids; not for "parity".
      pairs: "mqar" only: key-value pairs to remember.
      gap_power: "mqar" only, above 0: 1 draws gaps uniformly, less puts queries nearer to the pairs.
      noise: "mqar" only: random tokens instead of blanks.
      tokens: "copy" only: tokens to copy.
      needles: "needle" only: how many, of which one is asked for.
      modulus: "count" only: number of answers; counts are modulo this.
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
    """A random-access source of `count` examples of one split; each is made on access."""

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
    """The generator of a kind. Options that are None or belong to no kind are ignored."""
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
