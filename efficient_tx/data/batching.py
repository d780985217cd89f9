"""Batches of a run: batch i is a pure function of (seed, i), so the data position of a run is its step.

Under `task.bucket` a batch holds sequences of similar length, padded to a power of two. So only a few programs are
compiled, and little of their work is padding.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from efficient_tx.checks import at_least
from efficient_tx.data.collation import ExampleError, collate
from efficient_tx.task import Batch, Example, Source, Task

SPLITS = ("train", "validation", "test")
ROWS = 256  # examples that are checked together before a run
SHORTEST_BUCKET = 64  # shorter sequences are in this bucket too
WINDOW = 64  # batches that are sorted by length together


def check_examples(task: Task) -> None:
    """Reads, before a run, all examples of splits that are lists, and the first one of other splits, as augmented too.

    Raises:
      ValueError: a split is empty or cannot be indexed, or an example of it is one that the task cannot have.
    """
    for split in SPLITS:
        source = getattr(task, split)
        if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
            raise ValueError(f"the {split} split of {task.name} is a {type(source).__name__}: it needs len() and [i]")
        if not len(source):
            raise ValueError(f"the {split} split of {task.name} is empty")
        items = range(len(source) if isinstance(source, list | tuple) else 1)
        for start in range(0, len(items), ROWS):
            _read(task, source, items[start : start + ROWS])
    if task.augment is not None:
        _read(task, task.train, [0], augment=lambda example, row: task.augment(example, _generator(0, 0, row)))


def train_batches(
    task: Task, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset[Batch]:
    """The endless training batches of a run: element i is this process's part of the batch of step i.

    Every epoch shuffles the split anew. Epochs follow one another without a gap, so every batch is full. Process p
    holds rows p::process_count of the global batch: its row j is the global row p + j * process_count. Under
    `task.bucket` the examples of WINDOW consecutive batches are sorted by length, and these batches come in random
    order.

    Args:
      task: its `train` split is read and its `augment` applied; the generator of a row depends on (seed, step, row).
      batch_size: rows of the global batch; a multiple of `process_count`.
      seed: of shuffling and augmentation, at least 0.

    Raises:
      ValueError: `batch_size` or `seed` does not fit, the split is empty, or (on access) an example is too long.
    """
    rows = _rows(batch_size, process_index, process_count)
    count = len(task.train)
    if count == 0:
        raise ValueError(f"the train split of {task.name} is empty")
    at_least(0, seed=seed)

    @functools.lru_cache(maxsize=4)  # one epoch's order at a time, two where epochs meet
    def order(epoch: int) -> np.ndarray:
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
        # Not `permutation`: over its versions NumPy keeps the stream of `random` only.
        return np.argsort(generator.random(count), kind="stable")

    def items(start: int, stop: int) -> np.ndarray:
        """The items at places start to stop of the stream of shuffled epochs."""
        epochs, places = np.divmod(np.arange(start, stop), count)
        return np.array([order(epoch)[place] for epoch, place in zip(epochs.tolist(), places.tolist())])

    @functools.lru_cache(maxsize=2)
    def window(index: int) -> tuple[np.ndarray, np.ndarray]:
        """Items `[WINDOW, batch_size]` of the batches of a window, and the longest length in each batch."""
        size = WINDOW * batch_size
        chosen = items(index * size, (index + 1) * size)
        lengths = np.array([_length(_item(task, task.train, item), task.max_len) for item in chosen])
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, 1)))
        batches = np.argsort(lengths, kind="stable").reshape(WINDOW, batch_size)
        batches = batches[np.argsort(generator.random(WINDOW), kind="stable")]
        return chosen[batches], lengths[batches].max(axis=1)

    def batch(step: int) -> Batch:
        if task.bucket:
            chosen, longest = (part[step % WINDOW] for part in window(step // WINDOW))
        else:
            chosen, longest = items(step * batch_size, (step + 1) * batch_size), task.max_len
        augment = task.augment and (lambda example, row: task.augment(example, _generator(seed, step, int(rows[row]))))
        return _read(task, task.train, chosen[rows], longest, augment)

    return grain.MapDataset.source(_Lazy(sys.maxsize // batch_size, batch))


def evaluation_batches(
    source: Source,
    task: Task,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    numbered: bool = False,
) -> grain.MapDataset[Batch]:
    """Batches in which every item of `source` counts exactly once over all processes.

    Row r of global batch i is item i * batch_size + r; under `task.bucket` the items are sorted by length first.
    Process p holds rows p::process_count of every batch, so all processes have the same number of batches. The first
    item, with weight 0, fills up the last batch: a model need not be finite on an empty example.

    Args:
      source: a split of `task`.
      batch_size: rows of the global batch; a multiple of `process_count`.
      numbered: whether a batch has `item`, int64 `[B]`: the place of each row in the split, -1 of one that fills up.

    Raises:
      ValueError: `batch_size` does not fit, or (on access) an example is too long.
    """
    rows = _rows(batch_size, process_index, process_count)
    count = len(source)

    @functools.cache
    def by_length() -> tuple[np.ndarray, np.ndarray]:
        """The items, shortest first, and their lengths."""
        lengths = np.array([_length(_item(task, source, item), task.max_len) for item in range(count)])
        order = np.argsort(lengths, kind="stable")
        return order, lengths[order]

    def batch(index: int) -> Batch:
        places = index * batch_size + rows
        real = places < count
        places, longest = np.where(real, places, 0), task.max_len
        if task.bucket:
            order, lengths = by_length()
            places, longest = order[places], lengths[min((index + 1) * batch_size, count) - 1]
        result = _read(task, source, places, longest)
        result["weight"][~real] = 0.0
        return result | {"item": np.where(real, places, -1)} if numbered else result

    return grain.MapDataset.source(_Lazy(-(-count // batch_size), batch))


def first_examples(source: Source, task: Task, count: int) -> Batch:
    """The first examples of a split as one batch, padded to the full length; all of them if there are less."""
    return evaluation_batches(source, dataclasses.replace(task, bucket=False), batch_size=min(count, len(source)))[0]


def bucket(longest: int, max_len: int) -> int:
    """The length of a batch whose longest sequence has `longest` tokens: a power of two, at most `max_len`."""
    return min(max_len, max(SHORTEST_BUCKET, 1 << int(longest - 1).bit_length()))


def _read(
    task: Task,
    source: Source,
    items: Sequence[int],
    longest: int | None = None,
    augment: Callable[[Example, int], Example] | None = None,
) -> Batch:
    """The batch of these items of a split, padded to the bucket of `longest`, by default of the longest item.

    `augment` gets an example and its row. Raises ValueError if an item cannot be read, or its task cannot have it.
    """
    examples = [_item(task, source, item) for item in items]
    if augment:
        try:
            examples = [augment(example, row) for row, example in enumerate(examples)]
        except Exception as error:  # out of code of the user's own
            raise ValueError(f"the examples of {task.name} cannot be augmented: {_words(error)}") from error
    if longest is None:
        longest = max(_length(example, task.max_len) for example in examples)
    try:
        return collate(examples, task, bucket(longest, task.max_len))
    except ExampleError as error:
        raise ValueError(f"{error} ({_name(task, source, items[error.row])})") from None


def _item(task: Task, source: Source, item: int) -> Example:
    try:
        return source[int(item)]
    except Exception as error:  # out of code of the user's own
        raise ValueError(f"{_name(task, source, item)} of {task.name} cannot be read: {_words(error)}") from error


def _length(example: Example, max_len: int) -> int:
    """Tokens of an example, of a pair those of the longer sequence; `max_len` for one that `collate` refuses."""
    try:
        return max(len(example["inputs"]), len(example.get("inputs2", ())), 1)
    except Exception:
        return max_len


def _name(task: Task, source: Source, item: int) -> str:
    split = next((f"the {name} split" for name in SPLITS if getattr(task, name) is source), "a split")
    return f"example {item} of {split}"


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _generator(seed: int, step: int, row: int) -> np.random.Generator:
    """The random generator of a row of a step, the same in any process."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(step, row, 2)))


def _rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """The rows of the global batch that this process holds."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size}: must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: must be in [0, {process_count})")
    return np.arange(process_index, batch_size, process_count)


class _Lazy:
    """A random-access source of `length` elements; `element` computes each on access."""

    def __init__(self, length: int, element):
        self._length, self._element = length, element

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._element(int(index))
