"""Precision of the matrix products of an op."""

import jax


def full(precision: jax.lax.PrecisionLike) -> jax.lax.PrecisionLike:
    """HIGHEST for None; a name as the member of `jax.lax.Precision` that it means, others as they are."""
    if precision is None:
        return jax.lax.Precision.HIGHEST
    try:
        return jax.lax.Precision(precision)
    except ValueError:
        return precision


def missing(precision: jax.lax.PrecisionLike, kernels: str, *, high: bool = False) -> str | None:
    """Why kernels ("TPU", "GPU") that have HIGHEST and DEFAULT, or HIGH as well, do not support it, or None."""
    have = [jax.lax.Precision.HIGHEST, *([jax.lax.Precision.HIGH] if high else []), jax.lax.Precision.DEFAULT]
    if precision in have:
        return None
    return f"precision is {precision}: {kernels} kernels have {', '.join(p.name for p in have[:-1])} and DEFAULT"
