"""linear_scan: the linear recurrence with one decay per channel, token by token or in parallel."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp

from efficient_tx.kernels.linear_scan.options import Options
from efficient_tx.kernels.op import Op
from efficient_tx.kernels.shapes import check_rank

OP = Op("linear_scan", ("pallas_tpu", "pallas_gpu", "xla", "reference"))


def linear_scan(
    x: jax.Array, log_decay: jax.Array, *, initial_state: jax.Array | None = None, reverse: bool = False,
    implementation: str | None = None, interpret: bool = False, block_sizes: Hashable | None = None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The recurrence h_t = exp(log_decay_t) h_{t−1} + x_t in every channel, real or complex.

    It is the whole of HGRN (Qin et al. 2023, arXiv 2311.04823), of the linear recurrent unit (Orvieto et al. 2023,
    arXiv 2303.06349) and of diagonal state space models. A sequence may be processed in pieces: if each piece starts
    from the final state of the previous one, the result is the same. Padding is an identity step if both x and
    log_decay are 0 there.

    Args:
      x: `[batch, length, dim]`, any floating or complex dtype.
      log_decay: logarithm of the decay, real part at most 0: `[batch, length, dim]`, or `[dim]` for a constant one. All
        values are numerically safe, also −inf (the state is forgotten).
      initial_state: `[batch, dim]`; None means zeros.
      reverse: whether to run from the last token to the first: h_t = exp(log_decay_t) h_{t+1} + x_t. The final state is
        then the one at the first token.
      implementation: "reference" (one token at a time, differentiable in both modes), "xla", "pallas_tpu", "pallas_gpu"
        (memory linear in the length, reverse mode only), or None: the best one that supports the arguments.
      interpret: whether to run a Pallas kernel in interpret mode.
      block_sizes: the `BlockSizes` of the Pallas implementation that is named; None means its own.

    Returns:
      The states `[batch, length, dim]` and the one after the last step `[batch, dim]`, complex if any argument is. They
      and all arithmetic are in float32 (complex64) at least.

    Raises:
      ValueError: shapes that do not fit, or an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    check_shapes(x, log_decay, initial_state)
    given = (x, log_decay) if initial_state is None else (x, log_decay, initial_state)
    dtype = jnp.promote_types(jnp.result_type(*given), jnp.float32)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        x, log_decay = x.astype(dtype), log_decay.astype(dtype)
    log_decay = jnp.broadcast_to(log_decay, x.shape)
    state = jnp.zeros((x.shape[0], x.shape[2]), dtype) if initial_state is None else initial_state.astype(dtype)
    return OP(implementation, Options(reverse), x, log_decay, state, interpret=interpret, sizes=block_sizes)


def check_shapes(x: jax.Array, log_decay: jax.Array, initial_state: jax.Array | None) -> None:
    """Raises ValueError, one line, for the first shape that does not fit."""
    check_rank("batch, length, dim", x=x)
    batch, _, dim = x.shape
    if log_decay.shape not in (x.shape, (dim,)):
        raise ValueError(f"log_decay has shape {log_decay.shape}: pass {x.shape} or {(dim,)}")
    if initial_state is not None and initial_state.shape != (batch, dim):
        raise ValueError(f"initial_state has shape {initial_state.shape}: here it is {(batch, dim)}")
