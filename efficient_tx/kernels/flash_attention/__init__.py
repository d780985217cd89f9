"""flash_attention: softmax, sigmoid or Gaussian-kernel attention without storing the matrix of all weights."""

from functools import partial

import jax
import jax.numpy as jnp

from efficient_tx.checks import OptionError
from efficient_tx.kernels.flash_attention import reference, xla
from efficient_tx.kernels.flash_attention.options import SCORES, Options
from efficient_tx.kernels.forward_mode import reverse_only
from efficient_tx.kernels.implementations import choose
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import bool_mask

# Best first. Each module has `unsupported` and `forward`; all except the reference have `backward`.
IMPLEMENTATIONS = {"xla": xla, "reference": reference}


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    score: str = "softmax",
    mask: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: float = 0.0,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention with one of three scores; s_ij = scale · q_i·k_j + bias.

    "softmax": out_i = Σ_j softmax_j(s_ij) v_j. "sigmoid": out_i = Σ_j σ(s_ij) v_j (Ramapuram et al. 2024,
    arXiv 2409.04431). "gaussian": out_i = Σ_j exp(bias − scale · ‖q_i − k_j‖² / 2) v_j; with the default scale this is
    the kernel of Chen et al. 2021 (arXiv 2111.00035). Only softmax weights sum to one.

    Args:
      q: `[batch, queries, heads, head_dim]`, any floating dtype.
      k: `[batch, keys, groups, head_dim]`; groups divides heads, and query head h uses group h · groups // heads.
      v: `[batch, keys, groups, v_dim]`.
      score: "softmax", "sigmoid" or "gaussian".
      mask: key mask, bool `[batch, keys]`, True for real keys; the reference also takes a mask of all pairs,
        `[batch or 1, heads or 1, queries, keys]`.
      causal: query i sees keys j ≤ i + keys − queries only: the last query is aligned with the last key.
      scale: factor of the inner products; None means head_dim^-½, for every score.
      bias: number added to every logit.
      return_lse: whether to return (output, log-sum-exp of s over the keys); softmax only.
      implementation: "reference" (the plain formula, memory queries × keys, differentiable in both modes), "xla"
        (blockwise, memory linear in the lengths, reverse mode only), or None: the best one that supports the arguments.
      interpret: whether to run a Pallas kernel in interpret mode.
      precision: precision of the matrix products; None means full float32 (or float64), also on devices that round by
        default.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q, zero for a query without keys; with `return_lse` also
      `[batch, queries, heads]`, −inf for a query without keys. All arithmetic is in promote_types(dtype, float32).

    Raises:
      ValueError: shapes that do not fit, a float mask, or an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    check_shapes(q, k, v)
    mask = bool_mask(mask)
    check_mask(mask, q, k)
    if score not in SCORES:
        raise OptionError("score", score, f"choose one of {', '.join(SCORES)}")
    if return_lse and score != "softmax":
        raise ValueError(f"return_lse needs score='softmax': {score!r} weights are not normalised")
    pairs = mask is not None and mask.ndim == 4
    implementation = choose(
        "flash_attention", IMPLEMENTATIONS, implementation, interpret=interpret, mask_of_pairs=pairs
    )
    options = Options(
        score=score,
        causal=causal,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        bias=float(bias),
        precision=jax.lax.Precision.HIGHEST if precision is None else precision,
    )
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    repeats = q.shape[2] // k.shape[2]
    if mask is not None and not pairs:
        # A zero weight times NaN or infinity in the padding would be NaN.
        k, v = (jnp.where(mask[:, :, None, None], x, 0) for x in (k, v))
    arrays = [q.astype(dtype), *(jnp.repeat(x.astype(dtype), repeats, axis=2) for x in (k, v))]
    if implementation == "reference":
        out, lse = reference.forward(*arrays, mask, options)
    else:
        out, lse = blockwise(implementation, options, *(reverse_only(x, "flash_attention") for x in arrays), mask)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def check_mask(mask: jax.Array | None, q: jax.Array, k: jax.Array) -> None:
    """Raises ValueError, one line, for a mask that fits neither the keys nor all pairs."""
    batch, keys = k.shape[:2]
    pairs = (batch, q.shape[2], q.shape[1], keys)
    if mask is None or mask.shape == (batch, keys):
        return
    if mask.ndim != 4 or any(size not in (1, full) for size, full in zip(mask.shape, pairs)):
        raise ValueError(f"mask has shape {mask.shape}: flash_attention takes the key mask, ({batch}, {keys})")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def blockwise(implementation, options, q, k, v, mask):
    """Output and log-sum-exp of a blockwise implementation; the gradient is its own backward pass."""
    return IMPLEMENTATIONS[implementation].forward(q, k, v, mask, options)


def blockwise_forward(implementation, options, q, k, v, mask):
    out, lse = blockwise(implementation, options, q, k, v, mask)
    return (out, lse), (q, k, v, mask, out, lse)


def blockwise_backward(implementation, options, residuals, cotangents):
    return *IMPLEMENTATIONS[implementation].backward(*residuals, *cotangents, options), None


blockwise.defvjp(blockwise_forward, blockwise_backward)
