"""LevAttention (Kannan, Bhattacharyya, Kacham and Woodruff 2024, arXiv 2410.05462): the same few keys for all queries.

With the weights |q·k_j|^p / Σ_l |q·k_l|^p, the weight of key j is at most sup_y |y·k_j|^p / Σ_l |y·k_l|^p for every
query. For p = 2 this bound is the leverage score k_jᵀ(KᵀK)⁺k_j. The scores sum to the rank of K, so at most d/ε keys
have a score above ε. These keys contain every weight above ε of any query: a universal set U. For other p the ℓp Lewis
weights replace the scores; they bound the weights up to a factor (`numerics.lewis`). Attention then uses only U:

    "softmax"      out_i = Σ_{j∈U} softmax_{j∈U}(q_i·k_j / √d) v_j
    "polynomial"   out_i = Σ_{j∈U} |q_i·k_j|^p v_j / N_i,    N_i = q_iᵀ(KᵀK)q_i, the exact sum over all keys, for p = 2

The theorem holds for the polynomial weights. The paper trains softmax over U, which is the default here. Its authors
published no code. Choices that the paper leaves open: U is the `budget` keys with the highest scores, for each example
and key head; no key is always included; for p ≠ 2 the weights are divided by their sum over U. The causal form, in
`lev_stream`, is ours.
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.exact.softmax import softmax
from efficient_tx.attention.sampled.lev_stream import LevState, lev_causal, lev_init, lev_step
from efficient_tx.attention.sampled.lev_weights import attend_to, check_options, gram_matrix, newest
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.numerics.leverage import leverage_scores
from efficient_tx.numerics.lewis import lewis_weights
from efficient_tx.tokens.mask import as_last, key_mask

QUERY_TILE = 256  # queries whose polynomial weights are computed at a time


@checked_by(check_options)
def lev(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    budget: int = 128, p: float = 2.0, attention: str = "softmax",
    recent: int | None = None, ridge: float = 1.0, rescore: bool = True,
) -> jax.Array:  # fmt: skip
    """Attends to `budget` keys, selected by the keys alone; no gradient flows through the selection.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads. Each group selects its own keys.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens. With as many queries as keys it marks
        the queries too.
      key: unused, nothing is drawn.
      causal: whether to use the causal form of `lev_stream`. If the numbers of queries and keys differ, the last query
        is at the position of the last real key.
      budget: largest number of keys per query; ties go to the earlier key.
      p: power of the scores and of the "polynomial" weights, at least 1; must be 2 if causal.
      attention: "softmax" or "polynomial" weights.
      recent: causal only: number of the newest keys that are always kept, part of the budget; None means half of it.
        The parallel form stores one set of keys for every `recent` queries, keys · budget / recent in total; a decoder
        (`lev_step`) stores one set.
      ridge: causal only: the ridge λ of the leverage scores, above 0.
      rescore: causal only: whether stored keys compete by their score in the current prefix, else by their score on
        arrival.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. The arithmetic is float32 at
      least.

    Raises:
      ValueError: an option out of its range, or p ≠ 2 and causal.
    """
    check_shapes(q, k, v)
    del key
    recent = newest(budget, recent)
    batch, queries, keys = *q.shape[:2], k.shape[1]
    mask = key_mask(mask, batch, keys)
    if 0 in (batch, queries, keys):
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    arrays = [x.astype(dtype) for x in (q, k, v)]
    if mask is not None:
        marked = (queries == keys, True, True)
        arrays = [jnp.where(mask[..., None, None], x, 0) if mark else x for x, mark in zip(arrays, marked)]
    if causal:
        options = {"budget": budget, "recent": recent, "ridge": ridge, "rescore": rescore, "attention": attention}
        if queries == keys:
            return lev_causal(*arrays, mask, **options).astype(q.dtype)
        real = jnp.ones((batch, keys), bool) if mask is None else mask
        return as_last(lambda q: lev_causal(q, *arrays[1:], mask, **options), arrays[0], real).astype(q.dtype)

    queries_, keys_, values_ = arrays
    position = universal_set(keys_, mask, budget, p)
    chosen = (jnp.take_along_axis(x, position[..., None], axis=1) for x in (keys_, values_))
    real = jnp.full((batch, 1), keys) if mask is None else mask.sum(1, keepdims=True)
    few = (*chosen, jnp.arange(position.shape[1]) < real)
    if attention == "softmax":
        return attend_to(queries_, *few, attention=attention).astype(q.dtype)

    gram = gram_matrix(keys_) if p == 2 else None
    tile = min(QUERY_TILE, queries)
    tiles = jnp.pad(queries_, ((0, 0), (0, -queries % tile), (0, 0), (0, 0)))
    tiles = jnp.moveaxis(tiles.reshape(batch, -1, tile, *q.shape[2:]), 1, 0)
    out = jax.lax.map(jax.checkpoint(lambda tile: attend_to(tile, *few, attention=attention, p=p, gram=gram)), tiles)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :queries].astype(q.dtype)


def kept_keys(
    k: jax.Array, *, mask: jax.Array | None = None, causal: bool = False, budget: int = 128, p: float = 2.0
) -> jax.Array:
    """The universal set, see `Mixer.chosen`; arguments as in `lev`, where each query of the causal form has its own."""
    if causal:
        return k[:, :0]
    mask = key_mask(mask, *k.shape[:2])
    keys = k.astype(jnp.promote_types(k.dtype, jnp.float32))
    keys = keys if mask is None else jnp.where(mask[..., None, None], keys, 0)
    return jnp.take_along_axis(keys, universal_set(keys, mask, budget, p)[..., None], axis=1)


def universal_set(k: jax.Array, mask: jax.Array | None, budget: int, p: float) -> jax.Array:
    """Positions of the `budget` keys with the highest scores, int32 `[batch, min(budget, keys), groups]`, best first.

    If an example has fewer real keys, positions of padding follow.
    """
    rows = jnp.moveaxis(k, 2, 1)
    real = None if mask is None else mask[:, None]
    scores = leverage_scores(rows, mask=real) if p == 2 else lewis_weights(rows, p, mask=real)
    # Scores that differ only by rounding are ties, for example if there are at most head_dim keys.
    scores = jax.lax.reduce_precision(scores, jnp.finfo(scores.dtype).nexp, mantissa_bits=12)
    scores = scores if real is None else jnp.where(real, scores, -1)
    return jnp.moveaxis(jax.lax.top_k(scores, min(budget, k.shape[1]))[1], 1, 2)


class Lev(MultiHead):
    """Multi-head LevAttention; options as in `lev`, other arguments as in `MultiHead`.

    Raises:
      ValueError: an option out of its range, or p ≠ 2 and causal.
    """

    paper = "Kannan et al. 2024, arXiv 2410.05462"
    computes = "softmax over the m keys of the highest leverage scores"
    cost = "n·m + n·d"
    function = staticmethod(lev)
    exact = staticmethod(softmax)
    chosen = staticmethod(kept_keys)
    near_on = ("clustered", "imbalanced")
    windowed = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"budget": budget}

    def state_numbers(self, length: int) -> int:
        return self.heads * (self.budget * (2 * self.head_dim + 1) + self.head_dim**2)

    def empty_memory(self, batch: int, max_len: int | None, dtype: jnp.dtype) -> LevState:
        dtype = jnp.promote_types(dtype, jnp.float32)
        return lev_init(batch, self.heads, self.head_dim, budget=self.budget, dtype=dtype)

    def remember(
        self, projected: dict[str, jax.Array], memory: LevState, *,
        mask: jax.Array | None, count: jax.Array, first: bool,
    ) -> tuple[jax.Array, LevState]:  # fmt: skip
        names = ("recent", "ridge", "rescore", "attention")
        options = {name: getattr(self, name) for name in names}
        real = jnp.ones(projected["q"].shape[:2], bool) if mask is None else mask

        def next_token(state, token):
            *parts, real = token
            out, state = lev_step(*parts, state, mask=real, **options)
            return state, out

        tokens = [x.swapaxes(0, 1) for x in (*projected.values(), real)]
        memory, heads = jax.lax.scan(next_token, memory, tuple(tokens))
        return heads.swapaxes(0, 1), memory
