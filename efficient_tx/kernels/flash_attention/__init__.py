"""flash_attention: attention by a score and a mask, without storing the matrix of all weights."""

from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.checks import OptionError
from efficient_tx.kernels.flash_attention.mask import Causal, Padding
from efficient_tx.kernels.flash_attention.mask import Mask as Mask
from efficient_tx.kernels.flash_attention.mask import causal as causal
from efficient_tx.kernels.flash_attention.mask import documents as documents
from efficient_tx.kernels.flash_attention.mask import padding as padding
from efficient_tx.kernels.flash_attention.mask import prefix as prefix
from efficient_tx.kernels.flash_attention.mask import window as window
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.flash_attention.score import SCORES as SCORES
from efficient_tx.kernels.flash_attention.score import Relative as Relative
from efficient_tx.kernels.flash_attention.score import Score as Score
from efficient_tx.kernels.flash_attention.score import as_score
from efficient_tx.kernels.op import Op
from efficient_tx.kernels.precision import full
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import bool_mask

OP = Op("flash_attention", ("pallas_tpu", "pallas_gpu", "xla", "reference"), open_loops=True)


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    score: str | Score = "softmax",
    mask: jax.Array | Mask | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: float = 0.0,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: Any = False,
    precision: jax.lax.PrecisionLike = None,
    block_sizes: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention with any score; s_ij = scale · q_i·k_j + bias.

    The scores by name: "softmax": out_i = Σ_j softmax_j(s_ij) v_j. "sigmoid": out_i = Σ_j σ(s_ij) v_j (Ramapuram et al.
    2024, arXiv 2409.04431). "gaussian": out_i = Σ_j exp(bias − scale · ‖q_i − k_j‖² / 2) v_j; with the default scale
    this is the kernel of Chen et al. 2021 (arXiv 2111.00035). "power": weights |s_ij|^4 divided by their sum (Kannan et
    al. 2024, arXiv 2410.05462). "relu2": weights max(s_ij, 0)². "soft_cap", "alibi" and "relative": softmax of
    50 · tanh(s_ij / 50), of s_ij − slope · |i − j|, of s_ij + a table's bias. Their classes in `SCORES` take other
    numbers. A score of one's own is a subclass of `Score`, a few lines; its kernels and derivatives are derived.

    Args:
      q: `[batch, queries, heads, head_dim]`, any floating dtype.
      k: `[batch, keys, groups, head_dim]`; groups divides heads, and query head h uses group h · groups // heads.
      v: `[batch, keys, groups, v_dim]`.
      score: a name in `SCORES`, or a Score. Gradients flow to the arrays that it holds.
      mask: key mask, bool `[batch, keys]`, True for real keys, or a Mask: `window(n)`, `prefix(n)`, `documents(ids)`,
        `padding(mask)`, combined by `&`, `|` and `~`. Blocks of keys that a Mask empties are not computed. The
        reference also takes an array for all pairs, `[batch or 1, heads or 1, queries, keys]`.
      causal: query i sees keys j ≤ i + keys − queries only: the last query is aligned with the last key.
      scale: factor of the inner products; None means head_dim^-½, for every score. Where a score
        looks at norms, as the Gaussian, at least 0.
      bias: number added to every inner product.
      return_lse: whether to return (output, log-sum-exp of the logits over the keys); scores normalised like softmax
        only.
      implementation: "reference" (the plain formula, memory queries × keys, differentiable in both modes), "xla"
        (blockwise, memory linear in the lengths), "pallas_tpu" or "pallas_gpu"; all but the first in reverse mode only.
        None: for every platform the best one that supports the arguments.
      interpret: True, or interpreter parameters, runs a named Pallas kernel without its device.
      precision: precision of the matrix products of float32; None means full float32 (or float64), also on devices that
        round by default.
      block_sizes: the `BlockSizes` of the named implementation; None: its own choice.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q, zero for a query without keys; with `return_lse` also
      `[batch, queries, heads]`, −inf for a query without keys. Logits, weights and sums are in
      promote_types(dtype, float32); Pallas kernels take bfloat16 into their products as it is.

    Raises:
      ValueError: shapes that do not fit, a float mask, a scale below 0 where there are norms, or an implementation that
        does not support the arguments.
      TypeError: a Score or Mask that is no frozen dataclass, or does not give what it should for a block.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference"; a Pallas kernel
        in a program for another platform.
    """
    check_shapes(q, k, v)
    mask, pairs = split_mask(mask, q, k)
    if mask is not None and (real := mask.real_keys) is not None:
        # A zero weight times NaN or infinity in the padding would be NaN.
        k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    if causal:
        mask = Causal() if mask is None else Causal() & mask
    # Of several dtypes the widest: the keys and values of a low-rank method are sums, float32 where queries are not.
    operands = [x.astype(jnp.result_type(q, k, v)) for x in (q, k, v)]
    dtype = jnp.promote_types(operands[0].dtype, jnp.float32)
    bias = float(bias)
    score = as_score(score, heads=q.shape[2], bias=bias, dtype=dtype)
    if score.needs_norms and scale is not None and scale < 0:
        raise OptionError("scale", scale, f"{type(score).__name__} looks at norms: pass at least 0")
    if return_lse and score.normalise != "softmax":
        raise ValueError(f"return_lse needs a score normalised like softmax, {type(score).__name__} is not")
    options = Options(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        bias=bias,
        precision=full(precision),
    )
    if 0 in (*q.shape[:2], k.shape[1]):
        nothing = jnp.zeros((*q.shape[:3], v.shape[3]), jnp.result_type(q))
        return (nothing, jnp.full(q.shape[:3], -jnp.inf, dtype)) if return_lse else nothing
    out, lse = OP(implementation, options, *operands, score, mask, pairs, interpret=interpret, sizes=block_sizes)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def split_mask(mask: jax.Array | Mask | None, q: jax.Array, k: jax.Array) -> tuple[Mask | None, jax.Array | None]:
    """A Mask, and an array for all pairs; None for what there is not.

    Raises:
      ValueError, TypeError: one line, a mask that fits neither the keys nor all pairs, or a Mask that does not.
    """
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if mask is None:
        return None, None
    if isinstance(mask, Mask):
        mask.check()
        for name, segments, length in zip(("q_segments", "k_segments"), mask.segments, (queries, keys)):
            for x in jax.tree.leaves(segments):
                if not jnp.issubdtype(x.dtype, jnp.integer):
                    raise ValueError(f"mask has {name} of dtype {x.dtype}: pass integers")
                if x.shape not in ((batch, length), (1, length)):
                    raise ValueError(
                        f"mask has {name} of shape {x.shape}: pass [batch or 1, length], {(batch, length)}"
                    )
        return mask, None
    if callable(mask):
        raise TypeError(f"mask is {mask.__name__} itself: call it, a Mask is an instance")
    mask = bool_mask(mask)
    if mask.shape == (batch, keys):
        return Padding(mask.astype(jnp.int32)), None
    pairs = (batch, heads, queries, keys)
    if mask.ndim != 4 or any(size not in (1, full) for size, full in zip(mask.shape, pairs)):
        raise ValueError(
            f"mask has shape {mask.shape}: flash_attention takes the key mask, ({batch}, {keys}), or a Mask"
        )
    return None, mask
