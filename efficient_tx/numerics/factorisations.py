"""Matrix factorisations and triangular solves, one matrix at a time on the CPU. Only this module calls LAPACK.

jaxlib 0.10 spreads a batch of matrices over XLA's threads, and the call holds a thread while it waits for the others.
As many such calls at once as there are threads wait for ever: two independent solves of one program on two cores are
enough, or one on each of two CPU devices. A single matrix is not spread. On two cores, one at a time is as fast.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def one_at_a_time(factorise: Callable[..., Any]) -> Callable[..., Any]:
    """`factorise`, mapped on the CPU over one matrix after another; other platforms get the whole batch.

    Args:
      factorise: from matrices `[..., rows, columns]`, which all have the same leading dimensions, to arrays with these.

    Returns:
      The same function. `vmap` adds leading dimensions. It cannot be differentiated.
    """

    @jax.custom_batching.custom_vmap
    @functools.wraps(factorise)
    def batched(*matrices):
        if matrices[0].ndim == 2:
            return factorise(*matrices)
        return lax.platform_dependent(*matrices, cpu=in_turn, default=factorise)

    def in_turn(*matrices):
        lead = matrices[0].shape[:-2]
        flat = tuple(matrix.reshape(math.prod(lead), *matrix.shape[-2:]) for matrix in matrices)
        out = lax.map(lambda each: factorise(*each), flat)
        return jax.tree.map(lambda array: array.reshape(*lead, *array.shape[1:]), out)

    @batched.def_vmap
    def _(size, is_mapped, *matrices):
        pairs = zip(matrices, is_mapped, strict=True)
        whole = [matrix if mapped else jnp.broadcast_to(matrix, (size, *matrix.shape)) for matrix, mapped in pairs]
        out = batched(*whole)
        return out, jax.tree.map(lambda _: True, out)

    return batched


@one_at_a_time
def cholesky(a: jax.Array) -> jax.Array:
    """The lower factor L of a = L Lᵀ, `[..., m, m]`; NaN if `a` is not positive definite in its precision."""
    return lax.linalg.cholesky(a, symmetrize_input=False)


@one_at_a_time
def solve_lower(factor: jax.Array, b: jax.Array) -> jax.Array:
    """L⁻¹ b, `[..., m, n]`, for the lower triangle L of `factor` `[..., m, m]`."""
    return lax.linalg.triangular_solve(factor, b, left_side=True, lower=True)


@one_at_a_time
def solve_lower_transposed(factor: jax.Array, b: jax.Array) -> jax.Array:
    """L⁻ᵀ b, `[..., m, n]`, for the lower triangle L of `factor` `[..., m, m]`."""
    return lax.linalg.triangular_solve(factor, b, left_side=True, lower=True, transpose_a=True)


@one_at_a_time
def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues `[..., m]`, ascending, and eigenvectors in the columns of `[..., m, m]`, of a symmetric matrix."""
    return tuple(jnp.linalg.eigh(a))


@one_at_a_time
def qr(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q `[..., m, k]` and R `[..., k, n]` of `a` `[..., m, n]`, k = min(m, n)."""
    return tuple(jnp.linalg.qr(a))


@one_at_a_time
def svd(a: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U `[..., m, k]`, singular values `[..., k]`, descending, and Vᵀ `[..., k, n]` of `a` `[..., m, n]`, k = min."""
    return tuple(jnp.linalg.svd(a, full_matrices=False))
