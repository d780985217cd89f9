"""The sizes and lists of block_attention that are verified."""

from functools import partial

import numpy as np

from efficient_tx.kernels.block_attention import block_attention
from efficient_tx.kernels.case import Case, shape


def near(query, key):
    """A window of 128 tokens on each side."""
    return abs(query - key) <= 128


def real(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """Real tokens first; the last example has none."""
    batch, length = sizes
    counts = np.where(np.arange(batch) == batch - 1, 0, r.integers(1, length + 1, size=batch))
    return np.arange(length) < counts[:, None]


def listed(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """Near blocks, of which the first has fewer, then the first one, then drawn ones."""
    *_, queries, n = sizes
    blocks = r.integers(0, queries, size=sizes)
    blocks[..., :3] = np.arange(queries)[:, None] + np.arange(-1, 2)[:n]
    blocks[..., 3:4] = 0
    return np.where((blocks >= 0) & (blocks < queries), blocks, -1)


AXES = {
    "length": (1024, 4096, 65536),
    "heads": ("2", "8", "32/8"),
    "dim": (64, 128),
    "dtype": ("bfloat16", "float32"),
    "block": (64, 128),
    "pattern": ("window", "drawn", "biased"),
}
SMALL = {"length": (1, 200), "heads": ("2", "4/2"), "dim": (16,), "block": (16,)}


def case(length: int, heads: str, dim: int, dtype: str, block: int, pattern: str) -> Case | None:
    """`heads`: of queries / of keys; "window": one list for all heads, "drawn", "biased": one for each."""
    heads, *groups = map(int, heads.split("/"))
    batch = max(1, min(8, 65536 // length, 64 // heads)) if length > 200 else 2
    count, n = -(-length // block), {"window": 3, "drawn": 8, "biased": 4}[pattern]
    lists = (1, 1) if pattern == "window" else (batch, heads)
    if np.prod(lists) * count * n > 1 << 16:  # long lists are for few heads
        return None
    kv = shape(dtype, batch, length, *(groups or [heads]), dim)
    arrays = [shape(dtype, batch, length, heads, dim), kv, kv, shape("int32", *lists, count, n)]
    arrays.append(shape("float32", batch, heads, count, n) if pattern == "biased" else shape("bool", batch, length))
    return Case(
        partial(attend, block, pattern), tuple(arrays), {3: listed} | ({} if pattern == "biased" else {4: real})
    )


def attend(block, pattern, q, k, v, blocks, other, **keywords):
    named = {"bias": other} if pattern == "biased" else {"mask": other}
    visible = near if pattern == "window" else None
    options = {"blocks": blocks, "block_size": block, "visible": visible, "return_lse": True}
    return block_attention(q, k, v, **named, **options, **keywords)
