"""The sizes, scores and masks of flash_attention that are verified."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np

from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.flash_attention import (
    SCORES,
    Mask,
    Relative,
    causal,
    documents,
    flash_attention,
    padding,
    prefix,
    window,
)  # fmt: skip


def sorted_ids(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """Three documents, one after another."""
    return np.sort(r.integers(0, 3, size=sizes), axis=-1)


def real(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """Real tokens first; the last example has none."""
    batch, length = sizes
    counts = np.where(np.arange(batch) == batch - 1, 0, r.integers(1, length + 1, size=batch))
    return np.arange(length) < counts[:, None]


# Name -> whether it has an array of every key, of what distribution, and the Mask from it.
MASKS: dict[str, tuple[Callable | None, Callable[[jax.Array | None], Mask | None]]] = {
    "none": (None, lambda _: None),
    "causal": (None, lambda _: causal()),
    "window and sink": (None, lambda _: causal() & (window(512) | prefix(4))),
    "documents": (sorted_ids, lambda ids: documents(ids) & causal()),
    "padding": (real, padding),
    "not": (real, lambda mask: padding(mask) & ~window(64)),
}
AXES = {
    "length": (1024, 4096, 65536),
    "keys": ("all", "128"),
    "heads": ("2", "8", "32/8"),
    "dim": (64, 80, 128, 256),
    "dtype": ("bfloat16", "float32"),
    "score": tuple(SCORES),
    "mask": tuple(MASKS),
}
SMALL = {"length": (1, 200), "keys": ("all", "50"), "heads": ("2", "4/2"), "dim": (16,)}


def case(length: int, keys: str, heads: str, dim: int, dtype: str, score: str, mask: str) -> Case | None:
    """`keys`: as many as queries, or a number (landmarks); `heads`: of queries / of keys."""
    if keys != "all" and mask != "none":
        return None
    heads, *groups = map(int, heads.split("/"))
    of_keys = length if keys == "all" else int(keys)
    draw, make = MASKS[mask]
    object_ = SCORES[score]().given(heads=heads, bias=0.0)
    leaves, tree = jax.tree.flatten(object_)
    batch = max(1, min(8, 65536 // length, 64 // heads)) if length > 200 else 2

    def attend(q, k, v, *rest, **keywords):
        numbers, ids = rest[: len(leaves)], rest[len(leaves) :]
        one = jax.tree.unflatten(tree, numbers)
        return flash_attention(q, k, v, score=one, mask=make(*ids or (None,)), **keywords)

    kv = shape(dtype, batch, of_keys, *(groups or [heads]), dim)
    arrays = [shape(dtype, batch, length, heads, dim), kv, kv, *(shape("float32", *x.shape) for x in leaves)]
    draws = {3 + n: lambda r, sizes, x=x: np.asarray(x) for n, x in enumerate(leaves)}
    if draw is not None:
        arrays.append(shape("bool" if draw is real else "int32", batch, of_keys))
        draws[len(arrays) - 1] = draw
    without = ("pallas_tpu", "pallas_gpu") if isinstance(object_, Relative) else ()
    pairs = batch * heads * length * of_keys
    traffic = partial(least_traffic, pairs, dim, arrays[0].dtype.itemsize) if mask == "none" else None
    return Case(attend, tuple(arrays), draws, without, traffic)


def least_traffic(pairs: int, dim: int, size: int, on_chip: int) -> float:
    """Bytes between main and on-chip memory that exact attention of so many pairs of tokens needs: N² d² / M numbers.

    Up to a constant no program needs fewer if M ≥ d² numbers fit on chip (Dao et al. 2022, arXiv 2205.14135; Saha and
    Ye 2024, arXiv 2402.07443).

    Args:
      pairs: of queries and keys, of all heads and examples.
      dim: of a head.
      size: bytes of a number.
      on_chip: bytes.
    """
    return pairs * dim**2 / (on_chip / size) * size
