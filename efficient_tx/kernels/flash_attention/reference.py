"""Attention by the plain formula: all query-key weights at once. Differentiable in both modes."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention.options import Options


def unsupported(*, interpret: bool, mask_of_pairs: bool) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    return "interpret=True is for Pallas kernels, the plain formula has nothing to interpret" if interpret else None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """Output `[batch, queries, heads, v_dim]` and, for softmax, the log-sum-exp `[batch, queries, heads]` (else None).

    `q` is `[batch, queries, heads, head_dim]`, `k` and `v` have the same number of heads; all have one dtype, float32
    or float64; `mask` is bool `[batch, keys]`, or `[batch or 1, heads or 1, queries, keys]`, or None.
    """
    score, causal, scale, bias, precision = options
    queries, keys = q.shape[1], k.shape[1]
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision) + bias
    if score == "gaussian":
        q_norm, k_norm = (jnp.square(x).sum(-1).mT for x in (q, k))
        # Rounding may make a squared distance negative.
        logits = jnp.minimum(logits - scale / 2 * (q_norm[..., :, None] + k_norm[..., None, :]), bias)

    keep = jnp.ones((1, 1, queries, keys), bool)
    if mask is not None:
        keep &= mask[:, None, None, :] if mask.ndim == 2 else mask
    if causal:
        keep &= jnp.arange(keys) <= jnp.arange(queries)[:, None] + (keys - queries)
    logits = jnp.where(keep, logits, -jnp.inf)

    def apply(weights):
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision)

    if score == "sigmoid":
        return apply(jax.nn.sigmoid(logits)), None
    if score == "gaussian":
        return apply(jnp.exp(logits)), None
    weights, lse = softmax(logits)
    return apply(weights), lse.mT


def softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights `[..., queries, keys]` and log-sum-exp `[..., queries]`; zeros and −inf where all logits are −inf."""
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    return weights / total, jnp.where(seen, jnp.log(total) + peak, -jnp.inf)[..., 0]
