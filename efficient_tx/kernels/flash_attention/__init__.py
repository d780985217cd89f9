"""flash_attention: softmax, sigmoid or Gaussian-kernel attention that never holds all query-key weights at once."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention import reference

SCORES = ("softmax", "sigmoid", "gaussian")


def flash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    score: str = "softmax", mask: jax.Array | None = None, causal: bool = False, scale: float | None = None,
    bias: float = 0.0, return_lse: bool = False, implementation: str | None = None, interpret: bool = False,
    precision: jax.lax.Precision | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, groups = q.shape[2], k.shape[2]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    k, v = (jnp.repeat(x, heads // groups, axis=2).astype(dtype) for x in (k, v))
    out, lse = reference.attend(
        q.astype(dtype), k, v, mask, score=score, causal=causal, scale=scale, bias=bias,
        precision=precision or jax.lax.Precision.HIGHEST,
    )  # fmt: skip
    return (out.astype(q.dtype), lse) if return_lse else out.astype(q.dtype)
