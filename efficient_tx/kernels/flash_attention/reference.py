"""Attention by its formula: all query-key weights at once. Differentiable in both modes."""

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, *,
    score: str, causal: bool, scale: float, bias: float, precision: jax.lax.Precision,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """Output `[batch, queries, heads, v_dim]`, and for softmax the log-sum-exp `[batch, queries, heads]`.

    `q` `[batch, queries, heads, head_dim]`, `k` and `v` with as many heads, all of one dtype, float32 at least;
    `mask` bool `[batch, keys]` or None.
    """
    queries, keys = q.shape[1], k.shape[1]
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision) + bias
    if score == "gaussian":
        q_norm, k_norm = jnp.square(q).sum(-1), jnp.square(k).sum(-1)
        logits -= scale / 2 * (q_norm.mT[..., :, None] + k_norm.mT[..., None, :])

    keep = jnp.ones((1, 1, queries, keys), bool)
    if mask is not None:
        keep &= mask[:, None, None, :]
    if causal:
        keep &= jnp.arange(keys) <= jnp.arange(queries)[:, None] + (keys - queries)
    logits = jnp.where(keep, logits, -jnp.inf)

    def apply(weights):
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision)

    if score == "sigmoid":
        return apply(jax.nn.sigmoid(logits)), None
    if score == "gaussian":
        return apply(jnp.exp(logits)), None
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    lse = jnp.where(seen, jnp.log(total) + peak, -jnp.inf)
    return apply(weights / total), lse[..., 0].mT
