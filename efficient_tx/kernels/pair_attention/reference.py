"""Attention to pairs of tokens by the plain formula: all scores at once. Differentiable in both modes."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.pair_attention.options import Options

HIGHEST = jax.lax.Precision.HIGHEST


def unsupported(options: Options, *operands: jax.Array) -> None:
    """The plain formula supports everything."""


def forward(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, k2: jax.Array, v2: jax.Array, count: jax.Array,
    first: jax.Array,
) -> jax.Array:  # fmt: skip
    """Output `[heads, queries, v_dim]`, zero for a query without keys; operands as in `xla.forward`."""

    def head(q, k, v, k2, v2, count, first):
        position, token = (first + jnp.arange(len(q)))[:, None], jnp.arange(len(k))
        seen, seen2 = (visible(position, token, count, window, options.causal) for window in options.windows)
        a, b = options.pair(q[:, None], k2[None])
        scores = jnp.einsum("isd,jd->isj", a, k, precision=HIGHEST) + b[..., None]
        scores = jnp.where(seen[:, None] & seen2[:, :, None], scores, -jnp.inf)
        peak = jax.lax.stop_gradient(scores.max((1, 2), keepdims=True))
        weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0))
        total = weights.sum((1, 2))[:, None]
        sums = jnp.einsum("isj,jc,sc->ic", weights, v, v2, precision=HIGHEST)
        return jnp.where(total > 0, sums / jnp.where(total > 0, total, 1), 0)

    return jax.vmap(head)(q, k, v, k2, v2, count, first)


def visible(position: jax.Array, token: jax.Array, count: jax.Array, window: int | None, causal: bool) -> jax.Array:
    """Whether a query at `position` `[queries, 1]` sees `token` `[keys]` in a window: bool `[queries, keys]`."""
    window = len(token) if window is None else min(window, len(token))
    if causal:
        return (token < count) & (token <= position) & (token > position - window)
    start = jnp.clip(position - window // 2, 0, jnp.maximum(count - window, 0))
    return (token < count) & (token >= start) & (token < start + window)
