"""The example that is drawn: the longest of those that are looked at, as an image or as words."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from efficient_tx.task import Batch, Task

# Token ids of a task whose tokens are the pixels of a grey image.
PIXELS = 256
# A token that the model puts in front of an example.
IN_FRONT = "<front>"


class Example(NamedTuple):
    """Attributes:
    number: its place in the split.
    batch: a batch of it alone.
    picture: greys `[height, width]` of the image that its tokens are; None of a text.
    texts: of each of its sequences, two of a pair, what the real tokens stand for; empty for an image.
    """

    number: int
    batch: Batch
    picture: np.ndarray | None
    texts: list[list[str]]

    def names(self, sequence: int, count: int) -> list[str]:
        """What `count` tokens of a sequence stand for, those in front included; numbers where that is not known."""
        text = self.texts[sequence] if sequence < len(self.texts) else []
        if not text or count < len(text):
            return [str(i) for i in range(count)]
        return [*[IN_FRONT] * (count - len(text)), *text]


def longest_example(task: Task, batch: Batch) -> Example:
    """The example with the longest sequence, the first of equal ones; `batch` has the first examples of a split."""
    masks = [batch[name] for name in ("mask", "mask2") if name in batch]
    lengths = np.max([mask.sum(1) for mask in masks], axis=0) if masks else np.zeros(len(batch["label"]))
    number = int(np.argmax(lengths))
    alone = {name: array[number : number + 1] for name, array in batch.items()}
    picture = picture_of(task, alone)
    return Example(number, alone, picture, [] if picture is not None else texts_of(task, alone))


def picture_of(task: Task, alone: Batch) -> np.ndarray | None:
    """The greys of an image; tokens are one if there are only the 256 greys of the pixels of a square."""
    inputs = np.asarray(alone["inputs"][0], np.float32)
    if task.kind == "image":
        return inputs.mean(-1)
    full = "mask" not in alone or bool(alone["mask"].all())
    side = math.isqrt(len(inputs))
    pixels = task.kind == "tokens" and task.vocab_size == PIXELS and full and side * side == len(inputs)
    return inputs.reshape(side, side) if pixels else None


def texts_of(task: Task, alone: Batch) -> list[list[str]]:
    """What the real tokens of each sequence stand for."""
    given = [(alone[inputs][0], alone.get(mask)) for inputs, mask in (("inputs", "mask"), ("inputs2", "mask2"))
             if inputs in alone]  # fmt: skip
    return [spelled(ids if mask is None else ids[mask[0]], task.symbols) for ids, mask in given]


def spelled(ids: np.ndarray, symbols: Sequence[str] | None) -> list[str]:
    return [str(i) if symbols is None else symbols[i] for i in ids.tolist()]
