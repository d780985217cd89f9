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


def missing(precision: jax.lax.PrecisionLike, kernels: str) -> str | None:
    """Why kernels ("TPU", "GPU") that have HIGHEST and DEFAULT do not support a precision, or None."""
    if precision in (jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT):
        return None
    return f"precision is {precision}: {kernels} kernels have HIGHEST and DEFAULT"
