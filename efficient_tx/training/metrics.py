"""Metrics: dict of name -> (sum, count), two float32 scalars. They are divided only for reports.

Sums add up over micro-batches, devices, processes, steps and evaluation batches; nothing counts twice. A float32 sum of
ones is exact up to 2^24 = 16,777,216, more items than one window or evaluation batch has. For larger sums, `fetch` each
batch and add Python's floats, which stay exact.
"""

from typing import Any

import jax
import numpy as np

Metrics = dict[str, tuple[Any, Any]]


def zeros(*names: str) -> Metrics:
    """Zero sums and counts for each of `names`: float32 scalars in host memory."""
    return {name: (np.zeros((), np.float32), np.zeros((), np.float32)) for name in names}


def add(a: Metrics, b: Metrics) -> Metrics:
    """The metrics of the items in `a` and `b` together; both have the same names."""
    return jax.tree.map(lambda x, y: x + y, a, b)


def fetch(metrics: Metrics) -> Metrics:
    """The same metrics as Python floats; waits until the device has computed them."""
    return jax.tree.map(float, jax.device_get(metrics))


def means(metrics: Metrics) -> dict[str, float]:
    """sum / count of every metric, NaN if nothing was counted; waits until the device has computed them."""
    return {name: total / count if count else float("nan") for name, (total, count) in fetch(metrics).items()}
