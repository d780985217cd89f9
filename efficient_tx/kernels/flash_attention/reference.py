"""Attention by the plain formula: all query-key weights at once. Differentiable in both modes."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.flash_attention.mask import Mask
from efficient_tx.kernels.flash_attention.options import Options
from efficient_tx.kernels.flash_attention.score import Score


def unsupported(options: Options, *arrays) -> None:
    """The plain formula supports everything."""


def forward(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, score: Score, mask: Mask | None, pairs: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Output `[batch, queries, heads, v_dim]` and, for softmax, the log-sum-exp `[batch, queries, heads]` (else None).

    `q` is `[batch, queries, heads, head_dim]`, `k` and `v` `[batch, keys, groups, dim]`; the score's parameters are
    `[heads, ...]`; `pairs` is bool `[batch or 1, heads or 1, queries, keys]`, or None.
    """
    queries, keys = q.shape[1], k.shape[1]
    i, j = jnp.arange(queries)[:, None] + keys - queries, jnp.arange(keys)[None]
    keep = jnp.ones((1, 1, queries, keys), bool) if pairs is None else pairs
    if mask is not None:
        q_segment, k_segment = (
            jax.tree.map(lambda x, axis=axis: jnp.expand_dims(x, axis)[:, None], segments)
            for segments, axis in zip(mask.segments, (2, 1))
        )
        keep = keep & mask.allowed(i, j, q_segment, k_segment)
    return formula(options, q, k, v, score, keep, i, j)


def formula(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, score: Score, keep: jax.Array, i: jax.Array,
    j: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:  # fmt: skip
    """`forward` with any positions and pairs.

    `keep` is bool and broadcasts to `[batch, heads, queries, keys]`, the positions `i` of queries and `j` of keys to
    `[batch, queries, keys]`.
    """
    dtype, heads = jnp.promote_types(q.dtype, jnp.float32), q.shape[2]
    out_dtype, q = q.dtype, q.astype(dtype)
    k, v = (jnp.repeat(x.astype(dtype), heads // x.shape[2], axis=2) for x in (k, v))

    def head(score, head, q, k, v):
        """One head of all examples: q `[batch, queries, head_dim]`."""
        dot = options.scale * jnp.einsum("bqd,bkd->bqk", q, k, precision=options.precision) + options.bias
        norms = (options.scale / 2 * jnp.square(x).sum(-1) for x in (q, k))
        q_norm, k_norm = norms if score.needs_norms else (None, None)
        if q_norm is not None:
            q_norm, k_norm = q_norm[:, :, None], k_norm[:, None]
        return score.logits(dot, q_norm, k_norm, i, j, head)

    logits = jax.vmap(head, (0, 0, 2, 2, 2), 1)(score, jnp.arange(heads), q, k, v)

    def apply(weights):
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=options.precision).astype(out_dtype)

    if score.normalise == "softmax":
        weights, lse = softmax(jnp.where(keep, logits, -jnp.inf))
        return apply(weights), lse.mT
    weights = jax.vmap(type(score).weights, (0, 1), 1)(score, jnp.where(keep, logits, 0))
    weights = jnp.where(keep, weights, 0)
    if score.normalise == "sum":
        total = weights.sum(-1, keepdims=True)
        weights = jnp.where(total == 0, 0, weights / jnp.where(total == 0, 1, total))
    return apply(weights), None


def softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights `[..., queries, keys]` and log-sum-exp `[..., queries]`; zeros and −inf where all logits are −inf."""
    peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0)
    weights = jnp.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    seen = total > 0
    total = jnp.where(seen, total, 1)
    return weights / total, jnp.where(seen, jnp.log(total) + peak, -jnp.inf)[..., 0]
