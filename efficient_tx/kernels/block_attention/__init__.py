"""block_attention: softmax attention of query blocks to listed key blocks."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.checks import at_least
from efficient_tx.kernels.block_attention.options import Options
from efficient_tx.kernels.op import Op
from efficient_tx.kernels.precision import full
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import bool_mask

OP = Op("block_attention", ("pallas_tpu", "pallas_gpu", "xla", "reference"))


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    blocks: jax.Array,
    block_size: int,
    mask: jax.Array | None = None,
    causal: bool = False,
    scale: float | None = None,
    bias: jax.Array | float | None = None,
    visible: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
    precision: jax.lax.PrecisionLike = None,
    block_sizes: Any = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention in which each block of queries sees only the blocks of keys listed for it.

    out_i = Σ_j softmax_j(scale · q_i·k_j + bias) v_j over the keys j in the blocks listed for the block of i. Block b
    of a sequence has the positions from b · block_size to (b + 1) · block_size − 1; the last block may be shorter.

    Args:
      q: `[batch, queries, heads, head_dim]`, any floating dtype.
      k: `[batch, keys, groups, head_dim]`; groups divides heads, and query head h uses group h · groups // heads.
      v: `[batch, keys, groups, v_dim]`.
      blocks: int32 `[batch or 1, heads or 1, ⌈queries / block_size⌉, n]`: the key blocks of each query block, in any
        order; −1 means none. The values are not checked: a block listed twice counts twice, as in sampling with
        replacement.
      block_size: number of positions in a block of queries and of keys.
      mask: key mask, bool `[batch, keys]`, True for real keys.
      causal: query i sees keys j ≤ i + keys − queries only: the last query is aligned with the last key. Listed blocks
        with only future keys cost as much as others.
      scale: factor of the logits; None means head_dim^-½.
      bias: number added to the logits of a listed block; must broadcast to `[batch, heads, ⌈queries / block_size⌉, n]`.
        Differentiable.
      visible: a finer pattern within the listed blocks: `visible(query, key)` gets two broadcastable int32 arrays of
        positions, counted from 0 in q and in k, and returns a bool array, True if the query sees the key. A hashable
        function that depends only on its arguments; in Pallas kernels one of comparisons, arithmetic and `%`.
      return_lse: whether to return (output, log-sum-exp of the logits over the keys).
      implementation: "reference" (the plain formula, memory queries × keys, differentiable in both modes), "xla",
        "pallas_tpu", "pallas_gpu" (memory linear in the lengths, reverse mode only), or None: on each platform the best
        one that supports the arguments.
      interpret: whether to run a Pallas kernel in interpret mode.
      precision: precision of the matrix products; None means full float32 (or float64), also on devices that round by
        default.
      block_sizes: `BlockSizes` of the Pallas implementation that is named, or None: its own.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q, zero for a query without keys; with `return_lse` also
      `[batch, queries, heads]`, −inf for a query without keys. Logits, weights and sums are in
      promote_types(dtype, float32); Pallas kernels take bfloat16 into their products as it is.

    Raises:
      ValueError: shapes that do not fit, a float mask, or an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    check_shapes(q, k, v)
    mask = bool_mask(mask)
    check_blocks(q, k, mask, blocks, block_size)
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    if mask is not None:
        # A zero weight times NaN or infinity in the padding would be NaN.
        k, v = (jnp.where(mask[:, :, None, None], x, 0) for x in (k, v))
        mask = pad(mask, block_size)
    if bias is not None:
        lists = (batch, heads, *blocks.shape[2:])
        if jnp.broadcast_shapes(jnp.shape(bias), lists) != lists:
            raise ValueError(f"bias has shape {jnp.shape(bias)}: it must broadcast to the listed blocks, {lists}")
        bias = jnp.broadcast_to(bias, lists).astype(jnp.promote_types(q.dtype, jnp.float32))[..., None]
    options = Options(
        block_size=block_size,
        queries=queries,
        keys=keys,
        causal=causal,
        visible=visible,
        scale=head_dim**-0.5 if scale is None else float(scale),
        precision=full(precision),
    )
    if 0 in (batch, queries, keys):
        nothing = jnp.zeros((batch, queries, heads, v.shape[3]), q.dtype)
        lse = jnp.full(q.shape[:3], -jnp.inf, jnp.promote_types(q.dtype, jnp.float32))
        return (nothing, lse) if return_lse else nothing
    arrays = *(pad(x, block_size) for x in (q, k, v)), mask, jnp.asarray(blocks, jnp.int32), bias
    out, lse = OP(implementation, options, *arrays, interpret=interpret, sizes=block_sizes)
    out = out[:, :queries]
    return (out, lse[:, :queries]) if return_lse else out


def pad(x: jax.Array, size: int) -> jax.Array:
    """`x` `[batch, length, ...]` padded with zeros (False) to a multiple of `size`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % size), *((0, 0),) * (x.ndim - 2)))


def check_blocks(q: jax.Array, k: jax.Array, mask: jax.Array | None, blocks: jax.Array, block_size: int) -> None:
    """Raises ValueError, one line, for a mask or a list of blocks that does not fit."""
    batch, keys = k.shape[:2]
    if mask is not None and mask.shape != (batch, keys):
        raise ValueError(f"mask has shape {mask.shape}: block_attention takes the key mask, ({batch}, {keys})")
    at_least(1, block_size=block_size)
    count = -(-q.shape[1] // block_size)
    each = blocks.ndim == 4 and blocks.shape[0] in (1, batch) and blocks.shape[1] in (1, q.shape[2])
    if not each or blocks.shape[2] != count or blocks.shape[3] < 1 or not jnp.issubdtype(blocks.dtype, jnp.integer):
        raise ValueError(
            f"blocks is {blocks.dtype} {blocks.shape}: pass integers [{batch} or 1, {q.shape[2]} or 1, {count}, n],"
            f" for {q.shape[1]} queries in blocks of {block_size}"
        )
