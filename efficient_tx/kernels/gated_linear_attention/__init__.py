"""gated_linear_attention: linear attention with a decaying state, token by token or in chunks."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from efficient_tx.kernels.gated_linear_attention.options import Options
from efficient_tx.kernels.op import Op
from efficient_tx.kernels.shapes import check_rank
from efficient_tx.tokens.mask import bool_mask

OP = Op("gated_linear_attention", ("pallas_tpu", "pallas_gpu", "xla", "reference"))


def gated_linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
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
    """Linear attention with a decaying state: S_t = exp(log_decay_t) S_{t−1} + k_tᵀ v_t, out_t = scale · q_t S_t.

    This is the recurrence of gated linear attention (Yang et al. 2024, arXiv 2312.06635). With a decay per head it is
    that of RetNet and Mamba-2; without decay it is causal linear attention, unnormalised. A sequence may be processed
    in pieces, also of single tokens: if each piece starts from the final state of the previous one, the result is the
    same.

    Args:
      q: `[batch, length, heads, head_dim]`, any floating dtype.
      k: `[batch, length, groups, head_dim]`; groups divides heads, and query head h uses group h · groups // heads.
      v: `[batch, length, groups, v_dim]`.
      log_decay: logarithm of the decay, at most 0: per channel `[batch, length, heads, head_dim]`, per head
        `[batch, length, heads]`, constant `[heads]`, or None for no decay. All values are numerically safe, also −inf
        (the state is forgotten).
      initial_state: `[batch, heads, head_dim, v_dim]`; None means zeros.
      scale: factor of the output; None means head_dim^-½.
      mask: bool `[batch, length]`, True for real tokens. Padding does not change the state, and its output is zero.
      reverse: whether to run from the last token to the first: S_t = exp(log_decay_t) S_{t+1} + k_tᵀ v_t. The final
        state is then the one at the first token.
      implementation: "reference" (the recurrence, differentiable in both modes), "xla" (in chunks, memory linear in the
        length, reverse mode only), "pallas_tpu" or "pallas_gpu" (the same in kernels for one chip), or None: the best
        one that supports the arguments.
      interpret: whether to run a Pallas kernel in interpret mode.
      precision: precision of the matrix products; None means full float32 (or float64), also on devices that round by
        default. The Pallas kernels multiply bfloat16 q, k and v, and what they multiply them with, in bfloat16.
      block_sizes: the `BlockSizes` of the Pallas implementation that is named; None means its own.

    Returns:
      `[batch, length, heads, v_dim]` in the dtype of q, and the state after the last step
      `[batch, heads, head_dim, v_dim]` in promote_types(dtype, float32). States, exponentials and sums have this dtype.

    Raises:
      ValueError: shapes that do not fit, a float mask, or an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    mask = bool_mask(mask)
    check_shapes(q, k, v, log_decay, initial_state, mask)
    arrays = operands(q, k, v, log_decay=log_decay, initial_state=initial_state, mask=mask)
    options = Options.of(q, scale, reverse, precision)
    return OP(implementation, options, *arrays, interpret=interpret, sizes=block_sizes)


def operands(
    q: jax.Array, k: jax.Array, v: jax.Array, *more: jax.Array, log_decay: jax.Array | None,
    initial_state: jax.Array | None, mask: jax.Array | None,
) -> list[jax.Array | None]:  # fmt: skip
    """The operands of the recurrence: the tokens' arrays, the decay per channel or per head, and the state.

    All arrays of tokens are `[batch, length, heads, ...]`; a masked token is an identity step, nothing decays, is added
    or read.
    """
    batch, length, heads, head_dim = q.shape
    if log_decay is not None and log_decay.ndim < 4:
        log_decay = jnp.broadcast_to(log_decay, (batch, length, heads))[..., None]
    tokens = [q, k, v, *more, log_decay]
    if mask is not None:
        tokens = [None if x is None else jnp.where(mask[:, :, None, None], x, 0) for x in tokens]
    state = jnp.zeros((batch, heads, head_dim, v.shape[-1])) if initial_state is None else initial_state
    return [*tokens, state.astype(jnp.promote_types(jnp.result_type(q), jnp.float32))]


def check_shapes(
    q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array | None, initial_state: jax.Array | None,
    mask: jax.Array | None,
) -> None:  # fmt: skip
    """Raises ValueError, one line, for the first shape that does not fit."""
    check_rank(q=q, k=k, v=v)
    batch, length, heads, head_dim = q.shape
    groups, v_dim = v.shape[2:]
    if k.shape != (batch, length, groups, head_dim) or heads % groups:
        raise ValueError(f"q has shape {q.shape}, k {k.shape}: only heads may differ, as a multiple")
    if v.shape[:2] != (batch, length):
        raise ValueError(f"v has shape {v.shape}, k {k.shape}: batch, length and heads must agree")
    gates = (batch, length, heads, head_dim), (batch, length, heads), (heads,)
    if log_decay is not None and log_decay.shape not in gates:
        raise ValueError(f"log_decay has shape {log_decay.shape}: pass {', '.join(map(str, gates))} or None")
    state = (batch, heads, head_dim, v_dim)
    if initial_state is not None and initial_state.shape != state:
        raise ValueError(f"initial_state has shape {initial_state.shape}: here it is {state}")
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"mask has shape {mask.shape}: pass [batch, length], here {(batch, length)}")
