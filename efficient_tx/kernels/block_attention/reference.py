"""Block attention by the plain formula: all query-key weights at once. Differentiable in both modes."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.block_attention.options import Options
from efficient_tx.kernels.flash_attention.reference import softmax


def unsupported(options: Options, *operands: jax.Array) -> None:
    """The plain formula supports everything."""


def forward(
    options: Options, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, blocks: jax.Array,
    bias: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Output and log-sum-exp; operands as in `Options`."""
    size, precision, dtype = options.block_size, options.precision, q.dtype
    q, k, v = (x.astype(jnp.promote_types(dtype, jnp.float32)) for x in (q, k, v))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = options.scale * jnp.einsum("bqhd,bkhd->bhqk", q, k, precision=precision)

    # A block that is listed several times gets the sum of the weights; every key of a block may have its own bias.
    key_blocks = k.shape[1] // size
    listed = (blocks[..., None] == jnp.arange(key_blocks))[..., None]
    bias = (jnp.zeros(blocks.shape, q.dtype)[..., None] if bias is None else bias)[..., None, :]
    top = jax.lax.stop_gradient(jnp.where(listed, bias, -jnp.inf).max(-3))
    top = jnp.where(jnp.isfinite(top), top, 0)
    times = (listed * jnp.exp(jnp.where(listed, bias - top[..., None, :, :], 0))).sum(-3)

    def of_pairs(x):
        x = jnp.broadcast_to(x, (*x.shape[:-1], size)).reshape(*x.shape[:-2], -1)
        return jnp.repeat(x, size, axis=-2)

    times, top = of_pairs(times), of_pairs(top)
    keep = (times > 0) & (jnp.arange(k.shape[1]) < options.keys)
    keep = keep if mask is None else keep & mask[:, None, None, :]
    seen = options.seen(jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1]))
    keep = keep if seen is None else keep & seen
    logits = jnp.where(keep, logits + jnp.log(jnp.where(keep, times, 1)) + top, -jnp.inf)

    weights, lse = softmax(logits)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision=precision).astype(dtype), lse.mT
