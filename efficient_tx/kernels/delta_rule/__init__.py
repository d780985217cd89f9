"""delta_rule: linear attention that corrects what its state holds of a key, token by token or in chunks."""

from collections.abc import Hashable

import jax

from efficient_tx.kernels.gated_linear_attention import check_shapes, operands
from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.op import Op
from efficient_tx.tokens.mask import bool_mask

OP = Op("delta_rule", ("pallas_tpu", "pallas_gpu", "xla", "reference"))


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    beta: jax.Array,
    log_decay: jax.Array | None = None,
    initial_state: jax.Array | None = None,
    scale: float | None = None,
    mask: jax.Array | None = None,
    reverse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
    precision: jax.lax.PrecisionLike = None,
    block_sizes: Hashable | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule: S = exp(log_decay_t) S_{t−1}, S_t = S + β_t k_tᵀ (v_t − k_t S), out_t = scale · q_t S_t.

    The state decays first; then what it holds of the key moves towards the value, by the share β if the key has length
    1. Without decay this is DeltaNet (Yang et al. 2024, arXiv 2406.06484), with a decay per head Gated DeltaNet (Yang
    et al. 2025, arXiv 2412.06464), per channel Kimi Delta Attention (Kimi Team 2025, arXiv 2510.26692). A sequence may
    be processed in pieces, also of single tokens: if each piece starts from the final state of the previous one, the
    result is the same.

    Args:
      q: `[batch, length, heads, head_dim]`, any floating dtype.
      k: `[batch, length, groups, head_dim]`; groups divides heads, and query head h uses group h · groups // heads. The
        recurrence is stable if β‖k‖² ≤ 2; it is the caller who normalises keys.
      v: `[batch, length, groups, v_dim]`.
      beta: the strength of the correction, `[batch, length, heads]`.
      log_decay: logarithm of the decay, at most 0: per channel `[batch, length, heads, head_dim]`, per head
        `[batch, length, heads]`, constant `[heads]`, or None for no decay. All values are numerically safe, also −inf
        (the state is forgotten).
      initial_state: `[batch, heads, head_dim, v_dim]`; None means zeros.
      scale: factor of the output; None means head_dim^-½.
      mask: bool `[batch, length]`, True for real tokens. Padding does not change the state, and its output is zero.
      reverse: whether to run from the last token to the first. The final state is then the one at the first token.
      implementation: "reference" (the recurrence, differentiable in both modes), "xla", "pallas_tpu", "pallas_gpu" (in
        chunks, memory linear in the length, reverse mode only), or None: the best one that supports the arguments.
      interpret: whether to run a Pallas kernel in interpret mode.
      precision: precision of the matrix products; None means full float32 (or float64), also on devices that round by
        default. The Pallas kernels multiply bfloat16 q, k and v, and what they multiply them with, in bfloat16.
      block_sizes: sizes for the implementation that is named; None means its own.

    Returns:
      `[batch, length, heads, v_dim]` in the dtype of q, and the state after the last step
      `[batch, heads, head_dim, v_dim]` in promote_types(dtype, float32). States, exponentials and sums have this dtype.

    Raises:
      ValueError: shapes that do not fit, a float mask, or an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    mask = bool_mask(mask)
    check_shapes(q, k, v, log_decay, initial_state, mask)
    batch, length, heads, _ = q.shape
    if beta.shape != (batch, length, heads):
        raise ValueError(f"beta has shape {beta.shape}: pass [batch, length, heads], here {(batch, length, heads)}")
    arrays = operands(q, k, v, beta[..., None], log_decay=log_decay, initial_state=initial_state, mask=mask)
    options = Options.of(q, scale, reverse, precision)
    return OP(implementation, options, *arrays, interpret=interpret, sizes=block_sizes)
