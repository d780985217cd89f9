"""The causal form of LevAttention: a cache of at most `budget` keys with a guarantee, in parallel or token by token.

Tokens are processed in blocks of `recent`. A query attends to

  - the tokens of its own block up to itself: at most `recent` keys, and
  - the winners among the keys before its block: at most `budget − recent`. At the end of a block, the stored keys
    compete with those of the block by their ridge leverage scores in the current prefix,
    τ_j = k_jᵀ (Σ_{l ≤ now} k_l k_lᵀ + λI)⁻¹ k_j.

A score never increases as the prefix grows, and the scores of a prefix sum to less than d. So a key that loses has a
score of at most d / (budget − recent + 1), now and later: **every past key whose score in the prefix exceeds
d / (budget − recent + 1) is stored**, for any length of the stream. The state is `budget` keys and one d × d matrix.
Keys with a low score also have low weights: (q·k_j)² ≤ τ_j (Σ_{l ≤ now} (q·k_l)² + λ‖q‖²) for every q.

With `rescore=False` a key keeps its score on arrival, the online ridge leverage score. These scores sum to at most
d log(1 + ‖K‖_F² / (dλ)) (Cohen, Musco and Pachocki 2016, arXiv 1604.05448), a bound that grows with the stream. As long
as this sum is below ε (budget − recent + 1), every past key with a score above ε on arrival stays stored.

Ties go to the earlier key. `lev(..., causal=True)` first selects the keys of all blocks, then attends. `lev_step`
decodes: it takes one token at a time and selects the same keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.attention.sampled.lev_weights import attend_to, check_options, gram_matrix, newest
from efficient_tx.kernels.shapes import check_rank
from efficient_tx.numerics.factorisations import solve_lower
from efficient_tx.numerics.leverage import online_ridge_scores, ridge_factor
from efficient_tx.tokens.mask import bool_mask, compact, spread


class Slots(NamedTuple):
    """Competing keys: position int32 (−1: empty) and score `[batch, groups, slots]`, row `[..., slots, head_dim]`."""

    position: jax.Array
    score: jax.Array
    row: jax.Array


class LevState(NamedTuple):
    """The state of decoding; its memory does not depend on the number of tokens.

    Attributes:
      slots: the stored keys, `budget` slots: first the winners, in order of arrival, then the current block.
      values: the values of the stored keys, `[batch, groups, budget, v_dim]`.
      gram: Σ k kᵀ over all tokens so far, `[batch, groups, head_dim, head_dim]`.
      length: number of tokens so far, int32 `[batch]`.
    """

    slots: Slots
    values: jax.Array
    gram: jax.Array
    length: jax.Array


def lev_init(
    batch: int,
    groups: int,
    head_dim: int,
    v_dim: int | None = None,
    *,
    budget: int = 128,
    dtype: jnp.dtype = jnp.float32,
) -> LevState:
    """The empty state, before the first token.

    Args:
      batch: number of sequences.
      groups: number of key and value heads.
      head_dim: width of a key.
      v_dim: width of a value; None means head_dim.
      budget: largest number of stored keys.
      dtype: float32 or float64.
    """
    v_dim = head_dim if v_dim is None else v_dim
    position = jnp.full((batch, groups, budget), -1, jnp.int32)
    slots = Slots(position, jnp.zeros(position.shape, dtype), jnp.zeros((*position.shape, head_dim), dtype))
    values = jnp.zeros((*position.shape, v_dim), dtype)
    return LevState(slots, values, jnp.zeros((batch, groups, head_dim, head_dim), dtype), jnp.zeros(batch, jnp.int32))


def lev_step(
    q: jax.Array, k: jax.Array, v: jax.Array, state: LevState, *,
    mask: jax.Array | None = None, recent: int | None = None, ridge: float = 1.0, rescore: bool = True,
    attention: str = "softmax",
) -> tuple[jax.Array, LevState]:  # fmt: skip
    """One token of the causal form: the same output as `lev(..., causal=True)`, token by token.

    Args:
      q: `[batch, heads, head_dim]`.
      k: `[batch, groups, head_dim]`; groups divides heads.
      v: `[batch, groups, v_dim]`.
      state: the state after the previous tokens; its number of slots is the budget.
      mask: bool `[batch]`; False leaves the state unchanged and gives zeros.
      recent: number of the newest keys that are always kept, part of the budget; None means half of it.
      ridge: the ridge λ of the leverage scores, above 0.
      rescore: whether stored keys compete by their score in the current prefix, else by their score on arrival.
      attention: "softmax" or "polynomial" weights. These four options must be the same at every step.

    Returns:
      `[batch, heads, v_dim]` in the dtype of q, and the next state.

    Raises:
      ValueError: an option out of its range.
    """
    check_rank("batch, heads, dim", q=q, k=k, v=v)
    budget, dtype = state.values.shape[2], state.gram.dtype
    check_options(budget=budget, p=2.0, attention=attention, recent=recent, ridge=ridge, causal=True)
    recent = newest(budget, recent)
    real = jnp.ones(q.shape[0], bool) if mask is None else bool_mask(mask)
    query, row, value = (jnp.where(real[:, None, None], x, 0).astype(dtype) for x in (q, k, v))

    fill = state.length % recent
    full, before = (fill == 0) & (state.length > 0), (state.slots, state.values)
    slots, values = jax.lax.cond(
        full.any(),
        lambda: where_examples(full, new_block(state, budget - recent, ridge, rescore), before),
        lambda: before,
    )
    gram = state.gram + gram_matrix(row[:, None])
    fixed_row, fixed_gram = jax.lax.stop_gradient((row, gram))
    score = (
        jnp.zeros(row.shape[:2], dtype) if rescore else ridge_scores(fixed_row[:, :, None], fixed_gram, ridge)[..., 0]
    )
    position = jnp.broadcast_to(state.length[:, None], score.shape)
    here = (jnp.arange(budget) == (budget - recent + fill)[:, None])[:, None]

    def write(x, new):
        return jnp.where(here.reshape(*here.shape, *(1,) * (x.ndim - 3)), new[:, :, None], x)

    slots, values = jax.tree.map(write, (slots, values), (Slots(position, score, row), value))
    out = attend_to(
        query[:, None], slots.row.swapaxes(1, 2), values.swapaxes(1, 2), slots.position[:, 0] >= 0,
        attention=attention, gram=gram,
    )[:, 0]  # fmt: skip
    state = where_examples(real, LevState(slots, values, gram, state.length + 1), state)
    return jnp.where(real[:, None, None], out, 0).astype(q.dtype), state


def new_block(state: LevState, count: int, ridge: float, rescore: bool) -> tuple[Slots, jax.Array]:
    """Slots and values after a block: `count` winners, then one empty slot for each token of the next block."""
    slots = state.slots
    if rescore:
        slots = slots._replace(score=ridge_scores(*jax.lax.stop_gradient((slots.row, state.gram)), ridge))
    best = winners(slots.score, slots.position, count)
    free = slots.position.shape[2] - count

    def keep(x, empty):
        return jnp.pad(pick(x, best), ((0, 0), (0, 0), (0, free), *((0, 0),) * (x.ndim - 3)), constant_values=empty)

    return jax.tree.map(keep, (slots, state.values), (Slots(-1, 0, 0), 0))


def where_examples(condition: jax.Array, yes, no):
    """`jnp.where` per example: trees of arrays `[batch, ...]`, selected by `condition` `[batch]`."""
    return jax.tree.map(lambda y, n: jnp.where(condition.reshape(-1, *(1,) * (y.ndim - 1)), y, n), yes, no)


def winners(score: jax.Array, position: jax.Array, count: int) -> jax.Array:
    """The `count` slots with the highest scores, in slot order, `[batch, groups, count]`; empty slots come last."""
    best = jax.lax.top_k(jnp.where(position >= 0, score, -1), count)[1]
    return jnp.sort(best, axis=-1)


def pick(x: jax.Array, slots: jax.Array) -> jax.Array:
    """`x` `[batch, groups, all, ...]` at `slots` `[batch, groups, some]`."""
    slots = slots.reshape(*slots.shape, *(1,) * (x.ndim - 3))
    return jnp.take_along_axis(x, slots, axis=2)


def ridge_scores(rows: jax.Array, gram: jax.Array, ridge: float) -> jax.Array:
    """rowᵀ (gram + λI)⁻¹ row, `[batch, groups, slots]`."""
    return jnp.square(solve_lower(ridge_factor(gram, ridge), rows.mT)).sum(-2)


def held_before_blocks(
    k: jax.Array, tokens: jax.Array, recent: int, count: int, ridge: float, rescore: bool
) -> jax.Array:  # fmt: skip
    """The earlier keys that each block attends to.

    Args:
      k: `[batch, blocks · recent, groups, head_dim]`, the real tokens first, then zeros.
      tokens: number of real tokens, `[batch]`.
      recent: tokens per block.
      count: number of winners.
      ridge: the ridge λ of the leverage scores.
      rescore: whether keys compete by their score in the current prefix, else by their score on arrival.

    Returns:
      Positions int32 `[blocks, batch, groups, count]`, −1 where there are fewer.
    """
    rows = jnp.moveaxis(jax.lax.stop_gradient(k), 2, 1)
    batch, groups, length, head_dim = rows.shape
    position = jnp.where(jnp.arange(length) < tokens[:, None], jnp.arange(length), -1)
    score = jnp.zeros(rows.shape[:3], rows.dtype) if rescore else online_ridge_scores(rows, ridge=ridge)
    stream = Slots(jnp.broadcast_to(position[:, None], score.shape), score, rows)
    blocks = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(batch, groups, -1, recent, *x.shape[3:]), 2, 0), stream)

    def advance(carry, block):
        held, gram = carry
        all_slots = jax.tree.map(lambda *x: jnp.concatenate(x, axis=2), held, block)
        if rescore:
            gram += jnp.matmul(block.row.mT, block.row, precision=jax.lax.Precision.HIGHEST)
            all_slots = all_slots._replace(score=ridge_scores(all_slots.row, gram, ridge))
        slots = winners(all_slots.score, all_slots.position, count)
        return (jax.tree.map(lambda x: pick(x, slots), all_slots), gram), held.position

    empty = jax.tree.map(lambda x: jnp.zeros_like(x, shape=(batch, groups, count, *x.shape[3:])), stream)
    start = empty._replace(position=empty.position - 1), jnp.zeros((batch, groups, head_dim, head_dim), rows.dtype)
    return jax.lax.scan(advance, start, blocks)[1]


def lev_causal(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, *,
    budget: int, recent: int, ridge: float, rescore: bool, attention: str,
) -> jax.Array:  # fmt: skip
    """All tokens in parallel; arguments as in `lev`, in float32 or float64, with `mask` `[batch, keys]`."""
    batch, keys = k.shape[:2]
    tokens = jnp.full(batch, keys) if mask is None else mask.sum(1)
    q, k, v = (compact(x, mask) for x in (q, k, v))

    count, recent = min(budget - recent, keys), min(recent, keys)
    blocks = -(-keys // recent)
    q, k, v = (jnp.pad(x, ((0, 0), (0, blocks * recent - keys), (0, 0), (0, 0))) for x in (q, k, v))
    held = held_before_blocks(k, tokens, recent, count, ridge, rescore)

    def by_block(x):
        return x.reshape(batch, blocks, -1, *x.shape[2:])

    at = held.transpose(1, 0, 3, 2).reshape(batch, blocks * count, -1)
    # Every head stores the same number of keys.
    seen = [by_block(at[..., 0] >= 0), by_block(jnp.arange(blocks * recent) < tokens[:, None])]
    seen = jnp.concatenate([jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in seen], axis=2)
    k_seen, v_seen = (
        jnp.concatenate([by_block(jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=1)), by_block(x)], axis=2)
        for x in (k, v)
    )
    tiles = [by_block(q), k_seen, v_seen, seen]
    if attention == "softmax":
        out = attend_to(*(x.reshape(-1, *x.shape[2:]) for x in tiles), attention=attention, own=recent)
    else:
        of_blocks = gram_matrix(by_block(k))
        # Not as a difference of two sums: large keys of the own block would cancel its significant digits.
        before = jnp.cumsum(jnp.pad(of_blocks[:, :-1], ((0, 0), (1, 0), *((0, 0),) * 3)), axis=1)

        @jax.checkpoint
        def tile(inputs):
            *arrays, gram = inputs
            return attend_to(*arrays, attention=attention, gram=gram, own=recent)

        out = jax.lax.map(tile, (*tiles, before))
    return spread(out.reshape(batch, blocks * recent, *out.shape[-2:])[:, :keys], mask)
