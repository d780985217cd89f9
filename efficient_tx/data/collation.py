"""Batches of examples: every example is checked, then they are padded and stacked."""

from collections.abc import Mapping, Sequence

import numpy as np

from efficient_tx.task import Batch, Example, Task

LARGEST = float(np.finfo(np.float32).max)


class ExampleError(ValueError):
    """An example that its task cannot have: "an example of texts has the label 2: the task's are in [0, 2)".

    Attributes:
      row: its place among the examples of the batch.
      fault: the line without its subject.
    """

    def __init__(self, task: Task, row: int, fault: str):
        super().__init__(f"an example of {task.name} {fault}")
        self.row, self.fault = int(row), fault


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
      Images are stacked as float32 and have no mask.

    Raises:
      ExampleError: an example lacks a part or brings one that the task does not have; a part has another shape or type,
        or is longer than `length`; or an id, a label or a number is out of its range.
    """
    length = task.max_len if length is None else length
    _check_parts(examples, task)
    batch, shapes = {}, [()] * len(examples)
    if task.kind == "image":
        batch["inputs"] = _images(examples, task)
    else:
        batch["inputs"], batch["mask"] = _sequences(examples, "inputs", task, length)
        lengths = [(count,) for count in batch["mask"].sum(axis=1).tolist()]
        if task.kind == "token_pairs":
            batch["inputs2"], batch["mask2"] = _sequences(examples, "inputs2", task, length)
        if task.kind == "token_labels":
            shapes = lengths
        if task.own_masks:
            batch["mask"] &= _stacked([example["mask"] for example in examples], "mask", lengths, task, length, "b")
            batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (len(examples), 1))
    weights = [example.get("weight", np.ones(shape)) for example, shape in zip(examples, shapes)]
    weights = _stacked(weights, "weight", shapes, task, length)
    batch["weight"] = _within(weights, 0, LARGEST, "weight", "weights are finite and not negative", task, np.float32)
    for name in ("label", "label2") if any("mix" in example for example in examples) else ("label",):
        labels = _stacked([example[name] for example in examples], name, shapes, task, length)
        batch[name] = _labels(labels, batch["weight"] > 0, task)
    if "label2" in batch:
        shares = _stacked([example["mix"] for example in examples], "mix", shapes, task, length)
        batch["mix"] = _within(shares, 0, 1, "mix", "it is a weight in [0, 1]", task, np.float32)
    return batch


def _check_parts(examples: Sequence[Example], task: Task) -> None:
    """Raises ExampleError for an example that is no dict, lacks a part, or brings one that would not be used."""
    needed = ["inputs", "label"] + ["inputs2"] * (task.kind == "token_pairs") + ["mask"] * task.own_masks
    unused = {"mask": "its task must have own_masks=True", "inputs2": "its task must have kind='token_pairs'"}
    mixed = any(isinstance(example, Mapping) and "mix" in example for example in examples)
    for row, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise ExampleError(task, row, f"is a {type(example).__name__}, not a dict with {' and '.join(needed)}")
        for name in (*needed, "mix", "label2") if mixed else needed:
            if name not in example:
                raise ExampleError(task, row, f"has no {name!r}, but {', '.join(map(repr, example)) or 'nothing'}")
        for name, remedy in unused.items():
            if name in example and name not in needed:
                raise ExampleError(task, row, f"brings {'a mask' if name == 'mask' else name}: {remedy}")


def _sequences(examples: Sequence[Example], name: str, task: Task, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, or numbers if there is no vocabulary, `[B, length, ...]`, and bool `[B, length]`: what they fill."""
    arrays = _arrays([example[name] for example in examples], name, task)
    ids = task.vocab_size is not None
    kinds, rest = ("biu", ()) if ids else ("biuf", arrays[0].shape[1:])
    for row, array in enumerate(arrays):
        if array.ndim == 0 or array.shape[1:] != rest or (array.size and array.dtype.kind not in kinds):
            axes = ", ".join(map(str, ("length", *rest)))
            expected = "token ids are whole numbers [length]" if ids else f"numbers [{axes}] are expected"
            raise ExampleError(task, row, f"has {name!r} of {_form(array)}: {expected}")
        if len(array) > length:
            raise ExampleError(task, row, f"has {len(array)} tokens, more than task.max_len={task.max_len}")
    padded = _padded(arrays, length)
    mask = np.arange(length) < np.array([len(array) for array in arrays])[:, None]
    if not ids:
        return _within(padded, -LARGEST, LARGEST, "input", "inputs are finite", task, np.float32), mask
    rule = f"the task's are in [0, {task.vocab_size})"
    return _within(padded, 0, task.vocab_size - 1, "token id", rule, task, np.int32), mask


def _images(examples: Sequence[Example], task: Task) -> np.ndarray:
    """All images, float32 `[B, height, width, channels]`."""
    arrays = [np.asarray(example["inputs"]) for example in examples]
    shape = task.image_shape or arrays[0].shape
    for row, array in enumerate(arrays):
        if array.shape != shape or array.dtype.kind not in "biuf":
            raise ExampleError(task, row, f"has an image of {_form(array)}: numbers {list(shape)} are expected")
    return _within(np.stack(arrays), -LARGEST, LARGEST, "pixel", "pixels are finite", task, np.float32)


def _labels(labels: np.ndarray, counts: np.ndarray, task: Task) -> np.ndarray:
    """Labels in the dtype of the objective. Where `counts` is False they may be any whole numbers."""
    dtype = np.dtype(task.objective.label_dtype if task.objective else "int32")
    if dtype.kind in "iu" and labels.dtype.kind == "f":
        fractions = np.where(labels == np.floor(labels), 0, labels)
        _within(fractions, 0, 0, "label", "the task's labels are whole numbers", task)
    if task.objective is None:
        counted = np.where(counts, labels, 0)
        _within(counted, 0, task.num_classes - 1, "label", f"the task's are in [0, {task.num_classes})", task)
    elif dtype.kind in "iu":
        _within(labels, np.iinfo(dtype).min, np.iinfo(dtype).max, "label", f"the task's are {dtype}", task)
    else:
        _within(np.where(counts, labels, 0), -LARGEST, LARGEST, "label", "labels are finite", task)
    return labels.astype(dtype)


def _stacked(
    parts: Sequence, name: str, shapes: Sequence[tuple[int, ...]], task: Task, length: int, kinds: str = "biuf"
) -> np.ndarray:
    """Numbers of examples `[B]`, or of their tokens `[B, length]`. Raises ExampleError unless each has its shape."""
    arrays = _arrays(parts, name, task)
    for row, (array, shape) in enumerate(zip(arrays, shapes)):
        if array.shape != shape or (array.size and array.dtype.kind not in kinds):
            kind = "True or False" if kinds == "b" else "one number"
            expected = f"{kind} for each of the {shape[0]} tokens" if shape else kind
            raise ExampleError(task, row, f"has {name!r} of {_form(array)}: {expected} is expected")
    return _padded(arrays, length) if shapes[0] else np.array(arrays)


def _arrays(parts: Sequence, name: str, task: Task) -> list[np.ndarray]:
    arrays = []
    for row, part in enumerate(parts):
        try:
            arrays.append(np.asarray(part))
        except ValueError:
            raise ExampleError(task, row, f"has {name!r} of lists that differ in length") from None
    return arrays


def _padded(arrays: Sequence[np.ndarray], length: int) -> np.ndarray:
    """The arrays with zeros after their end, in a dtype that holds the values of all."""
    dtype = np.result_type(*{array.dtype for array in arrays if array.size}, bool)
    padded = np.zeros((len(arrays), length, *arrays[0].shape[1:]), dtype)
    for row, array in zip(padded, arrays):
        row[: len(array)] = array
    return padded


def _within(
    values: np.ndarray, least: float, most: float, what: str, rule: str, task: Task, dtype: type | None = None
) -> np.ndarray:
    """`values` in another dtype, which changes none of them. Raises ExampleError unless all are in [least, most]."""
    if values.size and not (values.min() >= least and values.max() <= most):  # NaN is not
        place = tuple(np.argwhere(~((values >= least) & (values <= most)))[0])
        raise ExampleError(task, place[0], f"has the {what} {values[place]}: {rule}")
    return values.astype(dtype, copy=False) if dtype else values


def _form(array: np.ndarray) -> str:
    """The type and shape of an array, in words."""
    return f"{array.dtype} {list(array.shape)}"
