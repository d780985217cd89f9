"""cosFormer (Qin et al. 2022, arXiv 2202.08791): linear attention that weights near keys more.

    out_i = Σ_j w_ij v_j / Σ_j w_ij,        w_ij = relu(q_i)·relu(k_j) cos(π/2 · (i − j) / M)

As cos(a − b) = cos a cos b + sin a sin b, the weights are inner products of the 2d features relu(x) cos a and relu(x)
sin a.

Unlike the published code: M is `max_len`, not the length of the current batch, which padding changes and which is
unknown in decoding; i and j count real tokens; the mask, which the published code ignores here, is used.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.attention.feature.linear import FeatureAttention, Features, feature_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask, query_positions, take, token_ranks


def cosformer(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    max_len: int, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """cosFormer attention: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      max_len: M, at least the number of keys; weights fall to zero at this distance.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens, whose ranks are the positions.
      key: unused, nothing is drawn.
      causal: query i sees keys j ≤ i only. If the numbers of queries and keys differ, the last query is at the last
        real key.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. The arithmetic is float32 at
      least; a sum of weights below 1e-6 counts as 1e-6.

    Raises:
      ValueError: more keys than max_len, or different numbers of queries and keys without `causal`.
    """
    check_shapes(q, k, v)
    (batch, keys), queries = k.shape[:2], q.shape[1]
    if keys > max_len:
        raise ValueError(f"length is {keys}, but cosformer was built for max_len={max_len}")
    if queries != keys and not causal:
        raise ValueError(f"cosformer has {queries} queries and {keys} keys: it needs positions, so use causal=True")
    mask = key_mask(mask, batch, keys)
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    angles = angles_of(token_ranks(mask, batch, keys), max_len, dtype)
    of_queries = angles if queries == keys else take(angles, query_positions(real, queries))
    features = Features(2 * q.shape[-1], turned)
    return feature_attention((q, of_queries), (k, angles), v, mask=mask, causal=causal, features=features)


def angles_of(positions: jax.Array, max_len: int, dtype: jnp.dtype) -> jax.Array:
    """π/2 · i / M of positions i `[batch, length]`: `[batch, length, 1, 1]`."""
    return (positions * (jnp.pi / 2 / max_len)).astype(dtype)[:, :, None, None]


def turned(tokens: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The features of (tokens, angles)."""
    x, angle = tokens
    x = jax.nn.relu(x)
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1)


class Cosformer(FeatureAttention):
    """Multi-head cosFormer; arguments as in `MultiHead`. Weights are zero at a distance of `max_len` tokens."""

    paper = "Qin et al. 2022, arXiv 2202.08791"
    computes = "ReLU features in place of the softmax, near tokens weighted more"
    cost = "n"
    function = staticmethod(cosformer)
    refuses: ClassVar = {"cross": "it needs positions"}
    needs_max_len = True

    @staticmethod
    def measured_with(q: jax.Array, budget: int, rng: np.random.Generator) -> dict[str, Any]:
        return {"max_len": q.shape[1]}

    def features_of(self, batch: int, dtype: jnp.dtype) -> Features:
        return Features(2 * self.head_dim, turned)

    def remember(
        self, projected: dict[str, Any], memory: tuple[jax.Array, Any], *,
        mask: jax.Array | None, count: jax.Array, first: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:  # fmt: skip
        q, k, v = projected.values()
        positions = count[:, None] + jnp.arange(q.shape[1])
        angles = angles_of(positions, self.max_len, memory[0].dtype)
        with_angles = {"q": (q, angles), "k": (k, angles), "v": v}
        heads, memory = super().remember(with_angles, memory, mask=mask, count=count, first=first)
        # Beyond max_len the weights of the first tokens would turn negative.
        return jnp.where((positions < self.max_len)[:, :, None, None], heads, jnp.nan), memory
