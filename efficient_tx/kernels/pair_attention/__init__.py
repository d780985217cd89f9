"""pair_attention: softmax attention of a query to pairs of tokens."""

import jax
import jax.numpy as jnp

from efficient_tx.kernels.op import Op
from efficient_tx.kernels.pair_attention.options import Options, Pair
from efficient_tx.kernels.shapes import check_rank
from efficient_tx.tokens.mask import compact, key_mask, repeat_heads, spread

OP = Op("pair_attention", ("xla", "reference"))


def pair_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, k2: jax.Array, v2: jax.Array, *,
    pair: Pair, mask: jax.Array | None = None, causal: bool = False,
    windows: tuple[int | None, int | None] = (None, None), implementation: str | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """out_i = Σ_jk softmax_jk(s_ijk) v_j ⊙ v2_k over the pairs within two windows, s_ijk = a_ik·k_j + b_ik.

    Positions are ranks among the real tokens.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k, k2: `[batch, keys, groups, head_dim]`, the first and the second token of a pair; groups divides heads and may
        differ between k and k2.
      v, v2: `[batch, keys, groups, v_dim]`, values of the first and the second token.
      pair: function of a query and a second token that returns a, the factor of the first token in the score, and b,
        the rest of the score. It must be hashable and depend only on its arguments.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`; with as many queries as keys it marks the queries too.
      causal: query i sees tokens j, k ≤ i only; the last query is at the last real token.
      windows: numbers of first and second tokens that a query sees: the last ones up to its own position if causal,
        else those around it, shifted inwards at the ends. None means all.
      implementation: "reference" (the plain formula, memory queries × keys × keys, differentiable in both modes), "xla"
        (memory linear in the lengths, reverse mode only), or None: the best one that supports the arguments.
      interpret: whether to run a Pallas kernel in interpret mode.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at masked queries and for a query without keys.
      Arithmetic is float32 at least.

    Raises:
      ValueError: shapes that do not fit, a float mask, or an implementation that does not support the arguments.
      NotImplementedError: forward-mode differentiation, with an implementation other than "reference".
    """
    check_shapes(q, k, v, k2, v2)
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    mask = key_mask(mask, batch, keys)
    if 0 in (batch, queries, keys):
        return jnp.zeros((batch, queries, heads, v.shape[3]), q.dtype)
    arrays = {"q": q, "k": k, "v": v, "k2": k2, "v2": v2}
    own_positions = queries == keys
    arrays = {n: x if n == "q" and not own_positions else compact(x, mask) for n, x in arrays.items()}
    count = jnp.full(batch, keys) if mask is None else mask.sum(axis=1)
    first = jnp.zeros(batch, int) if own_positions else count - queries

    flat = [
        repeat_heads(x, heads, n).astype(dtype).swapaxes(1, 2).reshape(batch * heads, x.shape[1], -1)
        for n, x in arrays.items()
    ]
    of_head = [jnp.repeat(x, heads) for x in (count, first)]
    options = Options(pair, causal, windows)
    out = OP(implementation, options, *flat, *of_head, interpret=interpret)
    out = out.reshape(batch, heads, queries, -1).swapaxes(1, 2).astype(q.dtype)
    return spread(out, mask) if own_positions else out


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, k2: jax.Array, v2: jax.Array) -> None:
    """Raises ValueError, one line, for the first shape that does not fit."""
    check_rank(q=q, k=k, v=v, k2=k2, v2=v2)
    for name, x, like, of in (("k2", k2, k, "k"), ("v2", v2, v, "v")):
        if x.shape[:2] != like.shape[:2] or x.shape[3] != like.shape[3]:
            raise ValueError(f"{name} has shape {x.shape}, {of} {like.shape}: batch, length and dim must agree")
    if k.shape[:2] != v.shape[:2] or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q, k, v have shapes {q.shape}, {k.shape}, {v.shape}: batch, keys and head_dim must agree")
