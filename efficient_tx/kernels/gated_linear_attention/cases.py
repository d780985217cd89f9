"""The sizes and decays of gated_linear_attention that are verified."""

import numpy as np

from efficient_tx.kernels.case import Case, shape
from efficient_tx.kernels.gated_linear_attention import gated_linear_attention

AXES = {
    "length": (1024, 4096, 65536),
    "heads": ("2", "8", "32/8"),
    "dim": (64, 128),
    "v_dim": (64, 128),
    "dtype": ("bfloat16", "float32"),
    "decay": ("none", "head", "channel"),
    "reverse": ("no", "yes"),
}
SMALL = {"length": (1, 200), "heads": ("2", "4/2"), "dim": (16,), "v_dim": (24,)}


def case(length: int, heads: str, dim: int, v_dim: int, dtype: str, decay: str, reverse: str) -> Case:
    """`heads`: of queries / of keys; the state carried on is the last argument."""
    heads, *groups = map(int, heads.split("/"))
    groups = (groups or [heads])[0]
    batch = max(1, min(8, 65536 // length, 64 // heads)) if length > 200 else 2

    def attend(q, k, v, state, log_decay=None, **keywords):
        return gated_linear_attention(
            q, k, v, log_decay=log_decay, initial_state=state, reverse=reverse == "yes", **keywords
        )

    q, k = (shape(dtype, batch, length, own, dim) for own in (heads, groups))
    arrays = [q, k, shape(dtype, batch, length, groups, v_dim), shape("float32", batch, heads, dim, v_dim)]
    if decay != "none":
        arrays.append(shape("float32", *q.shape[:3], *([dim] if decay == "channel" else [])))
    return Case(attend, tuple(arrays), {4: decays})


def decays(r: np.random.Generator, sizes: tuple[int, ...]) -> np.ndarray:
    """A memory of tens of tokens; one in fifty forgets everything."""
    return np.where(r.random(sizes) < 0.02, -np.inf, -r.exponential(0.1, sizes))
