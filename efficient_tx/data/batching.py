"""Batches of a run: batch i is a pure function of (seed, i), so the data position of a run is its step."""

import functools
import sys
from collections.abc import Sequence

import grain
import numpy as np

from efficient_tx.task import Batch, Example, Source, Task


def train_batches(
    task: Task, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset[Batch]:
    """The training batches of a run, without end: element i is this process's part of step i's batch.

    The split is shuffled anew in every epoch, and the epochs follow one another without a gap, so that every batch is
    full. Of the global batch of `batch_size` rows process p holds rows p::process_count: its row j is the global row
    p + j * process_count.

    Args:
      task: its `train` split is read.
      batch_size: rows of the global batch; a multiple of `process_count`.
      seed: of the shuffling, at least 0.

    Raises:
      ValueError: `batch_size` or `seed` does not fit, the split is empty, or (on access) an example is too long.
    """
    rows = _rows(batch_size, process_index, process_count)
    count = len(task.train)
    if count == 0:
        raise ValueError(f"the train split of {task.name} is empty")
    if seed < 0:
        raise ValueError(f"seed={seed}: must be 0 or more")

    @functools.lru_cache(maxsize=4)  # one epoch's order at a time, two where epochs meet
    def order(epoch: int) -> np.ndarray:
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
        # Not `permutation`: NumPy keeps the stream of `random` over its versions, but not that one's.
        return np.argsort(generator.random(count), kind="stable")

    def batch(step: int) -> Batch:
        epochs, places = np.divmod(step * batch_size + rows, count)
        items = [order(epoch)[place] for epoch, place in zip(epochs.tolist(), places.tolist())]
        return collate([task.train[int(item)] for item in items], task)

    return grain.MapDataset.source(_Lazy(sys.maxsize // batch_size, batch))


def evaluation_batches(
    source: Source, task: Task, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset[Batch]:
    """Batches in which every item of `source` counts exactly once over all processes.

    Row r of global batch i is item i * batch_size + r, and process p holds rows p::process_count of every batch, so
    all processes have the same number of batches. What fills up the last one is the first item with weight 0 (a real
    example, as a model need not be finite on an empty one).

    Args:
      source: a split of `task`.
      batch_size: rows of the global batch; a multiple of `process_count`.

    Raises:
      ValueError: `batch_size` does not fit, or (on access) an example is too long.
    """
    rows = _rows(batch_size, process_index, process_count)
    count = len(source)

    def batch(index: int) -> Batch:
        items = index * batch_size + rows
        real = items < count
        result = collate([source[int(item)] for item in np.where(real, items, 0)], task)
        result["weight"][~real] = 0.0
        return result

    return grain.MapDataset.source(_Lazy(-(-count // batch_size), batch))


def collate(examples: Sequence[Example], task: Task) -> Batch:
    """One batch of unpadded examples, padded with zeros on the right to `task.max_len`.

    An example may carry its own "weight" (a number, or `[length]` for per-token labels); otherwise it is 1.

    Returns:
      `inputs` `[B, max_len]` int32 (float32 where the task has no vocabulary; further axes of an example follow),
      `mask` bool `[B, max_len]`, True up to the example's length whatever its values; `inputs2` and `mask2` likewise
      for pairs; `label` int32 and `weight` float32, `[B]`, or `[B, max_len]` for per-token labels, with weight 0
      beyond the length. Images are stacked as they are and have no mask.

    Raises:
      ValueError: an example is longer than `task.max_len`.
    """
    if task.kind == "image":
        batch = {"inputs": np.stack([example["inputs"] for example in examples])}
    else:
        dtype = np.float32 if task.vocab_size is None else np.int32
        inputs, mask = _pad([example["inputs"] for example in examples], task, dtype)
        batch = {"inputs": inputs, "mask": mask}
        if task.kind == "token_pairs":
            batch["inputs2"], batch["mask2"] = _pad([example["inputs2"] for example in examples], task, dtype)
    if task.kind == "token_labels":
        ones = np.ones(task.max_len, np.float32)
        weights = [example.get("weight", ones[: len(example["inputs"])]) for example in examples]
        batch["label"], _ = _pad([example["label"] for example in examples], task, np.int32)
        batch["weight"], _ = _pad(weights, task, np.float32)
    else:
        batch["label"] = np.array([example["label"] for example in examples], np.int32)
        batch["weight"] = np.array([example.get("weight", 1.0) for example in examples], np.float32)
    return batch


def _pad(arrays: Sequence[np.ndarray], task: Task, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(array) for array in arrays])
    if lengths.max() > task.max_len:
        raise ValueError(f"an example of {task.name} has {lengths.max()} tokens, more than task.max_len={task.max_len}")
    padded = np.zeros((len(arrays), task.max_len, *np.shape(arrays[0])[1:]), dtype)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded, np.arange(task.max_len) < lengths[:, None]


def _rows(batch_size: int, process_index: int, process_count: int) -> np.ndarray:
    """The rows of the global batch that this process holds."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size={batch_size}: must be a positive multiple of the {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index={process_index}: must be in [0, {process_count})")
    return np.arange(process_index, batch_size, process_count)


class _Lazy:
    """A random-access source of `length` elements, computed by `element` when asked for."""

    def __init__(self, length: int, element):
        self._length, self._element = length, element

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        return self._element(int(index))
