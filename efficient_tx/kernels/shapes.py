"""Shapes: checks of queries, keys and values, and what Pallas kernels return and hold."""

from typing import Any

import jax

# Numbers that a kernel may have prefetched on a TPU: the scalar memory of a v5e is 1 MB.
MOST_SCALARS = 200_000


def check_rank(axes: str = "batch, length, heads, dim", /, **arrays: jax.Array) -> None:
    """Raises ValueError, one line, unless every array has these axes; the names of the arguments are the arrays'."""
    if any(x.ndim != axes.count(",") + 1 for x in arrays.values()):
        names, shapes = ", ".join(arrays), ", ".join(str(x.shape) for x in arrays.values())
        have, each = ("have shapes", " each") if len(arrays) > 1 else ("has shape", "")
        raise ValueError(f"{names} {have} {shapes}: pass [{axes}]{each}")


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError, one line, unless q, k and v are `[batch, length, heads, dim]` with fitting sizes."""
    check_rank(q=q, k=k, v=v)
    batch, keys, groups, head_dim = k.shape
    if q.shape[0] != batch or q.shape[3] != head_dim or q.shape[2] % groups:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}: batch and head_dim must agree, heads be a multiple")
    if v.shape[:3] != (batch, keys, groups):
        raise ValueError(f"v has shape {v.shape}, k {k.shape}: batch, length and heads must agree")


def nothing(q: jax.Array, v: jax.Array) -> str | None:
    """The reason against a kernel whose arrays have no entries, so that it would have no blocks; else None."""
    if 0 in (*q.shape, *v.shape):
        return f"q has shape {q.shape}, v {v.shape}: there is nothing to compute"
    return None


def result(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, operands: Any) -> jax.ShapeDtypeStruct:
    """A result of a Pallas call; in a `shard_map` it varies over the devices as the operands, a pytree, do."""
    kinds = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(operands)]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=type(kinds[0])(varying=varying))
