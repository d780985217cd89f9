"""Block attention by the plain formula: all query-key weights at once. Differentiable in both modes."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.block_attention.options import Options
from efficient_tx.kernels.flash_attention.reference import softmax


def unsupported(*, interpret: bool) -> str | None:
    """The reason why this implementation does not support the request, or None."""
    return "interpret=True is for Pallas kernels, the plain formula has nothing to interpret" if interpret else None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array, blocks: jax.Array, bias: jax.Array | None,
    options: Options,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output `[batch, padded queries, heads, v_dim]` and log-sum-exp `[batch, padded queries, heads]`.

    `q`, `k`, `v` have one dtype, float32 or float64, and lengths that are multiples of the block size; `real` is bool
    `[batch, padded keys]`, `blocks` int32 and `bias` `[batch, heads or 1, query blocks, n]`.
    """
    size, precision = options.block_size, options.precision
    # A zero weight times NaN or infinity in the padding would be NaN.
    k, v = (jnp.where(real[:, :, None, None], x, 0) for x in (k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = options.scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision)

    # A block that is listed several times gets the sum of the weights.
    listed = blocks[..., None] == jnp.arange(k.shape[1] // size)
    bias = jnp.zeros(blocks.shape, q.dtype) if bias is None else bias
    top = jax.lax.stop_gradient(jnp.where(listed, bias[..., None], -jnp.inf).max(-2))
    top = jnp.where(jnp.isfinite(top), top, 0)
    times = (listed * jnp.exp(jnp.where(listed, bias[..., None] - top[..., None, :], 0))).sum(-2)
    times, top = (jnp.repeat(jnp.repeat(x, size, axis=-2), size, axis=-1) for x in (times, top))
    keep = (times > 0) & real[:, None, None, :]
    seen = options.seen(jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1]))
    keep = keep if seen is None else keep & seen
    logits = jnp.where(keep, logits + jnp.log(jnp.where(keep, times, 1)) + top, -jnp.inf)

    weights, lse = softmax(logits)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision), lse.mT
