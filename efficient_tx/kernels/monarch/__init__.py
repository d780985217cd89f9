"""monarch: two block-diagonal products with a fixed permutation between them."""

from functools import partial

import jax
import jax.numpy as jnp

from efficient_tx.kernels.forward_mode import reverse_only
from efficient_tx.kernels.implementations import choose
from efficient_tx.kernels.monarch import reference, xla

# Best first. Each module has `unsupported` and `forward`; all except the reference have `backward`.
IMPLEMENTATIONS = {"xla": xla, "reference": reference}

# For inputs with fewer numbers the plain formula is as fast and compiles faster.
SMALL = 2**18


def monarch(
    x: jax.Array, w1: jax.Array, w2: jax.Array, *, implementation: str | None = None, interpret: bool = False
) -> jax.Array:
    """x times the Monarch matrix with the factors w1 and w2 (Dao et al. 2022, arXiv 2204.00595).

    hidden[k, q] = Σ_p x[k, p] w1[k, q, p], read as [r, l] with l fastest; y[s, l] = Σ_r hidden[r, l] w2[l, s, r].

    Args:
      x: `[..., k·p]`.
      w1: `[k, q, p]`, one q × p block per input block.
      w2: `[l, s, r]` with l·r = k·q, one s × r block per output group.
      implementation: "reference" (the plain formula, differentiable in both modes), "xla" (chunks of tokens, reverse
        mode only), or None: the reference for inputs with fewer than 2¹⁸ numbers, else the best one that supports the
        arguments.
      interpret: whether to run a Pallas kernel in interpret mode.

    Returns:
      `[..., s·l]`, l fastest, in the promoted dtype. Products have jax's default precision, as in `nnx.Linear`.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    check_shapes(x, w1, w2)
    if implementation is None and x.size < SMALL:
        implementation = "reference"
    implementation = choose("monarch", IMPLEMENTATIONS, implementation, interpret=interpret)
    dtype = jnp.result_type(x, w1, w2)
    x, w1, w2 = (array.astype(dtype) for array in (x, w1, w2))
    if implementation == "reference":
        return reference.forward(x, w1, w2)
    tokens = x.reshape(-1, x.shape[-1])
    out = chunked(implementation, *(reverse_only(array, "monarch") for array in (tokens, w1, w2)))
    return out.reshape(*x.shape[:-1], out.shape[-1])


def check_shapes(x: jax.Array, w1: jax.Array, w2: jax.Array) -> None:
    """Raises ValueError, one line, for the first shape that does not fit."""
    if w1.ndim != 3 or w2.ndim != 3:
        raise ValueError(f"w1 and w2 have shapes {w1.shape} and {w2.shape}: pass [k, q, p] and [l, s, r]")
    (k, q, p), (l, _, r) = w1.shape, w2.shape
    if k * q != l * r:
        raise ValueError(f"w1 has shape {w1.shape}, w2 {w2.shape}: k·q = {k * q} and l·r = {l * r} must be equal")
    if not x.ndim or x.shape[-1] != k * p:
        raise ValueError(f"x has shape {x.shape}: with w1 {w1.shape} its last axis must be k·p = {k * p}")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked(implementation, x, w1, w2):
    """The product of x `[tokens, k·p]` by chunks of tokens; the gradient is its own backward pass."""
    return IMPLEMENTATIONS[implementation].forward(x, w1, w2)[0]


def chunked_forward(implementation, x, w1, w2):
    out, hidden = IMPLEMENTATIONS[implementation].forward(x, w1, w2)
    return out, (x, w1, w2, hidden)


def chunked_backward(implementation, residuals, cotangent):
    return IMPLEMENTATIONS[implementation].backward(*residuals, cotangent)


chunked.defvjp(chunked_forward, chunked_backward)
