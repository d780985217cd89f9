"""The sizes of delta_rule that are verified."""

import numpy as np

from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.delta_rule import delta_rule

AXES = {
    "length": (1024, 4096, 65536),
    "heads": ("2", "8", "32/8"),
    "dim": (64, 128),
    "dtype": ("bfloat16", "float32"),
    "decay": ("none", "head", "channel"),
}
SMALL = {"length": (1, 75), "heads": ("2", "4/2"), "dim": (16,)}


def unit(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """Keys of length 1."""
    k = r.normal(size=sizes)
    return k / np.linalg.norm(k, axis=-1, keepdims=True)


def case(length: int, heads: str, dim: int, dtype: str, decay: str) -> Case:
    """`heads`: of queries / of keys and values."""
    heads, *groups = map(int, heads.split("/"))
    batch = max(1, min(8, 65536 // length, 64 // heads)) if length > 200 else 2
    kv = shape(dtype, batch, length, *(groups or [heads]), dim)
    arrays = [shape(dtype, batch, length, heads, dim), kv, kv, shape(dtype, batch, length, heads)]
    draws = {1: unit, 3: lambda r, sizes: r.uniform(0, 1, sizes), 4: lambda r, sizes: -r.exponential(0.1, sizes)}
    if decay != "none":
        arrays.append(shape("float32", batch, length, heads, *((dim,) if decay == "channel" else ())))

    def run(q, k, v, beta, log_decay=None, **keywords):
        return delta_rule(q, k, v, beta=beta, log_decay=log_decay, **keywords)

    return Case(run, tuple(arrays), {n: draw for n, draw in draws.items() if n < len(arrays)})
