"""Labels: checked once where they enter, before any cast."""

from typing import Any

import numpy as np


def class_labels(labels: Any, *, count: int, num_classes: int) -> np.ndarray:
    """The labels of `count` examples, an array `[count]` of integers.

    Raises:
      ValueError: there are more or fewer, or one is no whole number in [0, num_classes).
    """
    array = np.asarray(labels)
    if array.shape != (count,):
        raise ValueError(f"labels of shape {list(array.shape)} for {count} examples")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"labels of type {array.dtype}: they must be whole numbers in [0, {num_classes})")
    wrong = ~((array >= 0) & (array < num_classes) & (array == np.floor(array)))  # of NaN too
    if wrong.any():
        raise ValueError(f"the label {array[wrong][0]}: it must be a whole number in [0, {num_classes})")
    return array if array.dtype.kind in "iu" else array.astype(np.int64)
