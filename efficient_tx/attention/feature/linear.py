"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236): inner products of features instead of the softmax.

    out_i = φ(q_i) Σ_j φ(k_j)ᵀ v_j / (φ(q_i) · Σ_j φ(k_j)),        φ(x) = elu(x) + 1

The sums over the keys do not depend on the query. They are computed once or, in the causal form, carried as a state.
`feature_attention` does this for any non-negative features (`performer`, `cosformer`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.kernels import gated_linear_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask, over, place, query_positions, take

# Entries of the features of a piece of the sequence: 1 MB of float32, which fits in the cache of a core.
PIECE = 2**18


def linear(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Attention with the weights φ(q)·φ(k), φ = elu + 1: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: unused, nothing is drawn.
      causal: query i sees keys j ≤ i only. If the numbers of queries and keys differ, the last query is at the last
        real key.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. The arithmetic is float32 at
      least; a sum of weights below 1e-6 counts as 1e-6.
    """
    check_shapes(q, k, v)
    return feature_attention(q, k, v, mask=mask, causal=causal, features=Features(q.shape[-1], positive))


def positive(x: jax.Array) -> jax.Array:
    """elu(x) + 1, without the rounding error of the sum."""
    return jnp.exp(jnp.minimum(x, 0)) + jnp.maximum(x, 0)


class Features(NamedTuple):
    """Non-negative features of queries and keys.

    Attributes:
      count: number of features.
      of_queries: maps a piece of the queries, in float32 at least and zero at padding, to
        `[batch, piece, heads, count]`.
      of_keys: maps a piece of the keys, its mask `[batch, piece]` and the memory to three values: the features
        `[batch, piece, groups, count]`; a log_decay `[batch, piece, groups]` of all earlier keys, against overflow, or
        None (the decay must cancel in the output); and the memory for the next piece. None: as `of_queries`.
      memory: memory for the first piece.
      floor: smallest value of a sum of weights.
    """

    count: int
    of_queries: Callable
    of_keys: Callable | None = None
    memory: Any = None
    floor: float = 1e-6

    def empty(self, batch: int, heads: int, v_dim: int, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
        """What is carried from piece to piece, before the first one: sums over the keys, and the memory."""
        return jnp.zeros((batch, heads, self.count, v_dim + 1), dtype), self.memory


def feature_attention(
    q: Any, k: Any, v: jax.Array, *,
    mask: jax.Array | None, causal: bool, features: Features, carry: tuple[jax.Array, Any] | None = None,
) -> Any:  # fmt: skip
    """Mean of the values with the weights φ(q_i)·φ(k_j) of non-negative features, one piece of the tokens at a time.

    The features of a piece are computed when they are needed, and again in the backward pass. Features of the whole
    sequence would not fit in any cache, which is slow on CPUs, and could take more memory than everything else.

    Args:
      q: `[batch, queries, heads, head_dim]`, or a tuple of this and further arrays `[batch, queries, ...]`.
      k: `[batch, keys, groups, head_dim]`, or such a tuple.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]` or None; with as many queries as keys it marks both.
      causal: whether a query sees only the keys up to its own position; see `query_positions`.
      features: of queries and keys.
      carry: what is carried on from the tokens before these (`Features.empty`), in the causal form.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; with `carry` also the carry for the tokens after these.

    Raises:
      ValueError: heads is no multiple of groups, or the mask has another shape.
    """
    first = jax.tree.leaves(q)[0]
    (batch, queries, heads), (_, keys, groups, v_dim) = first.shape[:3], v.shape
    if heads % groups:
        raise ValueError(f"k has {groups} heads: the {heads} query heads are no multiple of it")
    dtype = jnp.promote_types(first.dtype, jnp.float32)
    if 0 in (batch, queries, keys):
        nothing = jnp.zeros((batch, queries, heads, v_dim), first.dtype)
        return nothing if carry is None else (nothing, carry)
    size = max(64, PIECE // (batch * heads * features.count))
    of_keys = features.of_keys or (lambda k, real, memory: (features.of_queries(k), None, memory))
    real = key_mask(mask, batch, keys)
    real = jnp.ones((batch, keys), bool) if real is None else real

    def cleaned(tokens, real):
        """Sets padding to zero, so that NaN values there have no effect."""
        return jax.tree.map(lambda x: jnp.where(over(real, x), x, 0).astype(dtype), tokens)

    def with_ones(v, real):
        return jnp.concatenate([cleaned(v, real), cleaned(jnp.ones_like(v[..., :1]), real)], axis=-1)

    def mean(sums):
        return (sums[..., :-1] / jnp.maximum(sums[..., -1:], features.floor)).astype(first.dtype)

    def attend_and_add(carry, q, k, v, real):
        state, memory = carry
        k, log_decay, memory = of_keys(cleaned(k, real), real, memory)
        if log_decay is not None:
            log_decay = jnp.repeat(log_decay, heads // groups, axis=2)
        sums, state = gated_linear_attention(
            features.of_queries(cleaned(q, real)), k, with_ones(v, real),
            log_decay=log_decay, initial_state=state, mask=real, scale=1.0,
        )  # fmt: skip
        return (state, memory), mean(sums)

    def add(carry, k, v, real):
        state, memory = carry
        k, log_decay, memory = of_keys(cleaned(k, real), real, memory)
        if log_decay is not None:
            state *= jnp.exp(log_decay.sum(axis=1))[..., None, None]
        return (state + dot("bjgf,bjgv->bgfv", k, with_ones(v, real)), memory), None

    def attend(state, q, real):
        return state, mean(dot("bihf,bhfv->bihv", features.of_queries(cleaned(q, real)), state))

    if causal:
        start = features.empty(batch, heads, v_dim, dtype) if carry is None else carry
        at = None if queries == keys else query_positions(real, queries)
        q = q if at is None else jax.tree.map(lambda x: place(x, at, keys), q)
        end, out = in_pieces(attend_and_add, start, (q, k, v, real), size)
        out = out if at is None else take(out, at)
        return out if carry is None else (out, end)
    (state, _), _ = in_pieces(add, features.empty(batch, groups, v_dim, dtype), (k, v, real), size)
    asked = real if queries == keys else jnp.ones((batch, queries), bool)
    return in_pieces(attend, jnp.repeat(state, heads // groups, axis=1), (q, asked), size)[1]


def dot(equation: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST)


def in_pieces(step: Callable, carry: Any, tokens: tuple, size: int) -> tuple[Any, Any]:
    """`carry, out = step(carry, *piece)` over pieces of about `size` tokens, recomputed in the backward pass.

    Args:
      step: returns the next carry, and `[batch, piece, ...]` or None. After the end of the sequence all tokens are zero
        (False).
      carry: the carry for the first piece.
      tokens: a tuple of (tuples of) arrays `[batch, length, ...]`.
      size: approximate number of tokens per piece.

    Returns:
      The last carry, and the concatenated outputs, `[batch, length, ...]`.
    """
    batch, length = jax.tree.leaves(tokens)[0].shape[:2]
    count = -(-length // size)
    size = length if count == 1 else 64 * -(-length // (64 * count))  # whole chunks of gated_linear_attention
    count = -(-length // size)

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, count * size - length), *((0, 0),) * (x.ndim - 2)))

    tokens = jax.tree.map(pad, tokens)

    @jax.checkpoint
    def piece(carry, n):
        return step(carry, *jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, n * size, size, axis=1), tokens))

    carry, out = jax.lax.scan(piece, carry, jnp.arange(count))
    if out is not None:
        out = out.swapaxes(0, 1).reshape(batch, count * size, *out.shape[3:])[:, :length]
    return carry, out


class FeatureAttention(MultiHead):
    """Multi-head attention with features; its causal form carries sums on. A variant says what they are."""

    def features_of(self, batch: int, dtype: jnp.dtype) -> Features:
        """Those of queries and keys, at evaluation."""
        raise NotImplementedError(f"{type(self).__name__} writes no `features_of`")

    def state_numbers(self, length: int) -> int:
        carry = jax.eval_shape(lambda: self.empty_memory(1, None, jnp.float32))
        return sum(x.size for x in jax.tree.leaves(carry))

    def empty_memory(self, batch: int, max_len: int | None, dtype: jnp.dtype) -> tuple[jax.Array, Any]:
        dtype = jnp.promote_types(dtype, jnp.float32)
        return self.features_of(batch, dtype).empty(batch, self.heads, self.head_dim, dtype)

    def remember(
        self, projected: dict[str, Any], memory: tuple[jax.Array, Any], *,
        mask: jax.Array | None, count: jax.Array, first: bool,
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:  # fmt: skip
        features = self.features_of(len(count), memory[0].dtype)
        return feature_attention(**projected, mask=mask, causal=True, features=features, carry=memory)


class LinearAttention(FeatureAttention):
    """Multi-head linear attention; arguments as in `MultiHead`."""

    paper = "Katharopoulos et al. 2020, arXiv 2006.16236"
    computes = "the features elu + 1 in place of the softmax"
    cost = "n"
    function = staticmethod(linear)

    def features_of(self, batch: int, dtype: jnp.dtype) -> Features:
        return Features(self.head_dim, positive)
