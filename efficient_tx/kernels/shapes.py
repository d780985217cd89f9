"""Shape checks of queries, keys and values."""

import jax


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """Raises ValueError, one line, unless q, k and v are `[batch, length, heads, dim]` with fitting sizes."""
    if any(x.ndim != 4 for x in (q, k, v)):
        raise ValueError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: pass [batch, length, heads, dim] each")
    batch, keys, groups, head_dim = k.shape
    if q.shape[0] != batch or q.shape[3] != head_dim or q.shape[2] % groups:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}: batch and head_dim must agree, heads be a multiple")
    if v.shape[:3] != (batch, keys, groups):
        raise ValueError(f"v has shape {v.shape}, k {k.shape}: batch, length and heads must agree")
