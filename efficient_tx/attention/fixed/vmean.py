"""V-mean: the mean of the values, a baseline that a good method must beat (Chen et al. 2021, arXiv 2112.05359).

    out_i = (1/n) Σ_j v_j,        causal: out_i = (1/i) Σ_{j ≤ i} v_j

Attention with uniform weights: a rank-one approximation of softmax that uses neither queries nor keys. The paper
reports it as a baseline of Skeinformer: on some tasks of Long Range Arena it is above every efficient attention.
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.exact.softmax import softmax
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask, query_positions, repeat_heads, take


def vmean(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """The mean of the values of the real tokens.

    Args:
      q: `[batch, queries, heads, head_dim]`; only its shape and dtype matter.
      k: unused; the mean weights all keys equally.
      v: `[batch, keys, groups, v_dim]`; groups divides heads.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens.
      key: unused, nothing is drawn.
      causal: query i averages the values up to its own position. If the numbers of queries and keys differ, the last
        query is at the last real key.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. Sums are float32 at least.

    Raises:
      ValueError: heads is no multiple of groups, or the mask has another shape.
    """
    check_shapes(q, k, v)
    del k, key
    batch, queries, heads, _ = q.shape
    keys = v.shape[1]
    mask = key_mask(mask, batch, keys)
    v = repeat_heads(v, heads, "v")
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    values = jnp.where(real[:, :, None, None], v, 0).astype(jnp.promote_types(v.dtype, jnp.float32))
    if not causal:
        sums, counts = values.sum(axis=1, keepdims=True), real.sum(axis=1, keepdims=True)
        shape = (batch, queries, *v.shape[2:])
        return jnp.broadcast_to(sums / jnp.maximum(counts, 1)[:, :, None, None], shape).astype(q.dtype)
    means = jnp.cumsum(values, axis=1) / jnp.maximum(jnp.cumsum(real, axis=1), 1)[:, :, None, None]
    return (means if queries == keys else take(means, query_positions(real, queries))).astype(q.dtype)


class VMean(MultiHead):
    """The mean of the values, between an input and an output projection; arguments as in `MultiHead`."""

    paper = "Chen et al. 2021, arXiv 2112.05359"
    computes = "the mean of the values: a control"
    cost = "n"
    function = staticmethod(vmean)
    exact = staticmethod(softmax)
    projections = ("v",)
    rotated = ()
    has_positions = False

    def attend(
        self, v: jax.Array, *, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:  # fmt: skip
        return vmean(v, v, v, **self.arguments(mask=mask, key=key))

    def state_numbers(self, length: int) -> int:
        return self.heads * self.head_dim

    def empty_memory(self, batch: int, max_len: int | None, dtype: jnp.dtype) -> jax.Array:
        """The sum of the values, `[batch, heads, head_dim]`."""
        return jnp.zeros((batch, self.heads, self.head_dim), jnp.promote_types(dtype, jnp.float32))

    def remember(
        self, projected: dict[str, jax.Array], memory: jax.Array, *,
        mask: jax.Array | None, count: jax.Array, first: bool,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        v = projected["v"]
        values = v if mask is None else jnp.where(mask[:, :, None, None], v, 0)
        sums = memory[:, None] + jnp.cumsum(values.astype(memory.dtype), axis=1)
        seen = count[:, None] + 1 + jnp.arange(v.shape[1])
        return (sums / seen[:, :, None, None]).astype(v.dtype), sums[:, -1]
