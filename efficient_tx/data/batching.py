"""Batches of a run: batch i is a pure function of (seed, i), so the data position of a run is its step.

Under `task.bucket` a batch holds sequences of similar length, padded to a power of two. So only a few programs are
compiled, and little of their work is padding.
"""

import functools
import sys
from collections.abc import Sequence

import grain
import numpy as np

from efficient_tx.checks import at_least
from efficient_tx.task import Batch, Example, Source, Task

SHORTEST_BUCKET = 64  # shorter sequences are in this bucket too
WINDOW = 64  # batches that are sorted by length together


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
        lengths = np.array([_length(task.train[int(item)]) for item in chosen])
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index, 1)))
        batches = np.argsort(lengths, kind="stable").reshape(WINDOW, batch_size)
        batches = batches[np.argsort(generator.random(WINDOW), kind="stable")]
        return chosen[batches], lengths[batches].max(axis=1)

    def batch(step: int) -> Batch:
        if task.bucket:
            chosen, longest = (part[step % WINDOW] for part in window(step // WINDOW))
        else:
            chosen, longest = items(step * batch_size, (step + 1) * batch_size), task.max_len
        examples = [task.train[int(item)] for item in chosen[rows]]
        if task.augment is not None:
            examples = [task.augment(example, _generator(seed, step, int(row))) for example, row in zip(examples, rows)]
        return collate(examples, task, bucket(longest, task.max_len))

    return grain.MapDataset.source(_Lazy(sys.maxsize // batch_size, batch))


def evaluation_batches(
    source: Source, task: Task, *, batch_size: int, process_index: int = 0, process_count: int = 1
) -> grain.MapDataset[Batch]:
    """Batches in which every item of `source` counts exactly once over all processes.

    Row r of global batch i is item i * batch_size + r; under `task.bucket` the items are sorted by length first.
    Process p holds rows p::process_count of every batch, so all processes have the same number of batches. The first
    item, with weight 0, fills up the last batch: a model need not be finite on an empty example.

    Args:
      source: a split of `task`.
      batch_size: rows of the global batch; a multiple of `process_count`.

    Raises:
      ValueError: `batch_size` does not fit, or (on access) an example is too long.
    """
    rows = _rows(batch_size, process_index, process_count)
    count = len(source)

    @functools.cache
    def by_length() -> tuple[np.ndarray, np.ndarray]:
        """The items, shortest first, and their lengths."""
        lengths = np.array([_length(source[item]) for item in range(count)])
        order = np.argsort(lengths, kind="stable")
        return order, lengths[order]

    def batch(index: int) -> Batch:
        places = index * batch_size + rows
        real = places < count
        places, longest = np.where(real, places, 0), task.max_len
        if task.bucket:
            order, lengths = by_length()
            places, longest = order[places], lengths[min((index + 1) * batch_size, count) - 1]
        result = collate([source[int(item)] for item in places], task, bucket(longest, task.max_len))
        result["weight"][~real] = 0.0
        return result

    return grain.MapDataset.source(_Lazy(-(-count // batch_size), batch))


def bucket(longest: int, max_len: int) -> int:
    """The length of a batch whose longest sequence has `longest` tokens: a power of two, at most `max_len`."""
    return min(max_len, max(SHORTEST_BUCKET, 1 << int(longest - 1).bit_length()))


def collate(examples: Sequence[Example], task: Task, length: int | None = None) -> Batch:
    """One batch of unpadded examples, padded with zeros on the right to `length`, by default `task.max_len`.

    An example may have its own "weight" (a number, or `[length]` for per-token labels); the default is 1. Under
    `task.own_masks` its bool "mask" `[length]` marks its real tokens. If the examples have "label2" and "mix"
    (numbers), these are stacked too.

    Returns:
      `inputs` `[B, length]` int32 (float32 if the task has no vocabulary; further axes of an example follow).
      `mask` bool `[B, length]`, True up to the example's length for any token values. With masks of the examples' own,
      True for their real tokens; then `positions` int32 `[B, length]` are the places of the tokens.
      `inputs2` and `mask2` for pairs.
      `label` int32 and `weight` float32, `[B]`, or `[B, length]` for per-token labels, with weight 0 after the
      example's end. Labels have the dtype of the objective if the task has one.
      Images are stacked unchanged and have no mask.

    Raises:
      ValueError: an example is longer than `length`, has a mask without `task.own_masks`, or a label or a token id that
        the task does not have.
    """
    length = task.max_len if length is None else length
    labels = np.dtype(task.objective.label_dtype if task.objective else "int32")
    if task.kind == "image":
        batch = {"inputs": np.stack([example["inputs"] for example in examples])}
    else:
        dtype = np.float32 if task.vocab_size is None else np.int32
        inputs, mask = _pad([example["inputs"] for example in examples], length, task, dtype)
        batch = {"inputs": inputs, "mask": mask}
        if task.kind == "token_pairs":
            batch["inputs2"], batch["mask2"] = _pad([example["inputs2"] for example in examples], length, task, dtype)
        if task.own_masks:
            for row, example in zip(mask, examples):
                row[: len(example["mask"])] &= example["mask"]
            batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (len(examples), 1))
        elif "mask" in examples[0]:
            raise ValueError(f"an example of {task.name} brings a mask: its task must have own_masks=True")
    if task.kind == "token_labels":
        ones = np.ones(length, np.float32)
        weights = [example.get("weight", ones[: len(example["inputs"])]) for example in examples]
        batch["label"], _ = _pad([example["label"] for example in examples], length, task, labels)
        batch["weight"], _ = _pad(weights, length, task, np.float32)
    else:
        batch["label"] = np.array([example["label"] for example in examples], labels)
        batch["weight"] = np.array([example.get("weight", 1.0) for example in examples], np.float32)
    if "mix" in examples[0]:
        batch["label2"] = np.array([example["label2"] for example in examples], np.int32)
        batch["mix"] = np.array([example["mix"] for example in examples], np.float32)
    _check(batch, examples, task)
    return batch


def _check(batch: Batch, examples: Sequence[Example], task: Task) -> None:
    """Raises ValueError for labels that the batch cannot hold, and for labels or token ids out of range."""
    for example in examples:
        given = np.asarray(example["label"])
        if batch["label"].dtype.kind in "iu" and given.dtype.kind not in "iub" and (given != given.astype(int)).any():
            raise ValueError(f"an example of {task.name} has the label {given}: the task's labels are whole numbers")
    if task.objective is None:
        _in_range("label", batch["label"][batch["weight"] > 0], task.num_classes, task)
    for name in ("inputs", "inputs2"):
        if task.vocab_size is not None and name in batch:
            _in_range("token id", batch[name], task.vocab_size, task)


def _in_range(what: str, values: np.ndarray, count: int, task: Task) -> None:
    """Raises ValueError unless all values are in [0, count)."""
    if values.size and not (values.min() >= 0 and values.max() < count):
        wrong = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"an example of {task.name} has the {what} {wrong}: the task's are in [0, {count})")


def _length(example: Example) -> int:
    """Tokens of an example; of a pair, those of the longer sequence."""
    return max(len(example["inputs"]), len(example.get("inputs2", ())), 1)


def _pad(arrays: Sequence[np.ndarray], length: int, task: Task, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(array) for array in arrays])
    if lengths.max() > length:
        raise ValueError(f"an example of {task.name} has {lengths.max()} tokens, more than task.max_len={task.max_len}")
    padded = np.zeros((len(arrays), length, *np.shape(arrays[0])[1:]), dtype)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded, np.arange(length) < lengths[:, None]


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
