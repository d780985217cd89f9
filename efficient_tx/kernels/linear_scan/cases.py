"""The sizes of linear_scan that are verified."""

import jax
import numpy as np

from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.linear_scan import linear_scan

AXES = {
    "length": (1024, 4096, 65536),
    "features": (512, 2048),
    "dtype": ("bfloat16", "float32", "complex64"),
    "direction": ("forward", "reverse"),
}
SMALL = {"length": (1, 200), "features": (5,)}


def decay(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    return -r.exponential(0.1, sizes)


def case(length: int, features: int, dtype: str, direction: str) -> Case:
    """Complex arrays are given as their real and imaginary parts, and so are complex results."""
    batch = max(1, min(8, 65536 // length)) if length > 200 else 2
    parts = 2 if dtype == "complex64" else 1
    part = shape("float32" if dtype == "complex64" else dtype, batch, length, features)

    def scan(*arrays, **keywords):
        x, log_decay = (jax.lax.complex(*x) if len(x) == 2 else x[0] for x in (arrays[:parts], arrays[parts:]))
        results = linear_scan(x, log_decay, reverse=direction == "reverse", **keywords)
        return [(x.real, x.imag) if parts == 2 else x for x in results]

    return Case(scan, (part,) * (2 * parts), {parts: decay})
