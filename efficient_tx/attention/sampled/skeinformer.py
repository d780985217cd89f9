"""Skeinformer (Chen et al. 2021, arXiv 2112.05359): softmax attention from sampled columns, linear in length.

Pilot queries J see all keys, B = softmax(Q_J Kᵀ / √K). Keys J′ are drawn without replacement with probabilities
proportional to (Σ_j B_ji²)^½ ‖v_i‖. A query attends to the drawn keys. Every other key gets the geometric mean of the
drawn weights ("adaptive row normalisation"). With s_ij = q_i·k_j / √K, n keys and d drawn keys,

    out_i = (Σ_J′ exp(s_ij) v_j + g_i Σ_rest v_j) / (Σ_J′ exp(s_ij) + (n − d) g_i),     g_i = exp(mean_J′ s_ij).

The rows of the pilots are exact. The mean of the logits is the logit of the mean key k̄. So the rest acts as one more
key k̄, whose value is the mean value of the rest and whose weight counts n − d times. This is a merge of two
log-sum-exps, which never overflows; the published code takes the exponential of raw logits.

Unlike the published code: pilots are drawn without replacement, each example has its own draws and its own d, and
padding may be at any place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.exact.softmax import softmax
from efficient_tx.checks import OptionError
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.numerics.each import of_each
from efficient_tx.numerics.landmarks import draw_by_weight, tokens_at
from efficient_tx.numerics.random import evaluation_keys, example_keys, fold, sample_tokens, take_tokens
from efficient_tx.tokens.mask import key_mask, repeat_heads


def check_options(*, columns, pilots):
    """Raises ValueError, one line, for the first option that is out of its range."""
    for name, value in (("columns", columns), ("pilots", pilots)):
        if value < 1:
            raise OptionError(name, value, "skeinformer needs at least 1")


@checked_by(check_options)
def skeinformer(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, columns: int = 128, pilots: int = 128,
) -> jax.Array:  # fmt: skip
    """Approximates `softmax` with sampled keys: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens. With as many queries as keys it marks
        the queries too; otherwise all queries are real.
      key: draws pilots and columns: one key per example `[batch]`, or a single key, folded per example; None
        (evaluation) means the same fixed key for every example. All heads share the pilots; each head draws its own
        columns.
      columns: number of keys that a query attends to; an example with fewer keys uses all of them and is exact.
      pilots: number of queries that see all keys, to find the important columns.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for an example without keys. The arithmetic is float32 at
      least; the columns are selected in float32, and no gradient flows through the selection.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    check_shapes(q, k, v)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    mask = key_mask(mask, batch, keys)
    if 0 in (batch, queries, keys):
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    result_dtype = q.dtype
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    v = v if mask is None else jnp.where(mask[..., None, None], v, 0)
    draws = evaluation_keys(batch) if key is None else example_keys(key, batch)

    drawn = draw(q, k, v, mask, draws, columns, pilots)
    valid = drawn.valid
    k_chosen, v_chosen = (jnp.where(valid[..., None, None], tokens_at(x, drawn.column), 0) for x in (k, v))

    rest = real.sum(1) - valid.sum(1)
    near, lse = flash_attention(q, k_chosen, v_chosen, mask=valid, return_lse=True)
    far = repeat_heads(v.sum(1, keepdims=True), heads, "v")[:, 0] - v_chosen.sum(1)
    far = far / jnp.maximum(rest, 1)[:, None, None]
    k_mean = k_chosen.sum(1) / jnp.maximum(valid.sum(1), 1)[:, None, None]
    logit = jnp.einsum("bqhd,bhd->bqh", q, k_mean, precision=jax.lax.Precision.HIGHEST) * head_dim**-0.5
    logit += jnp.log(jnp.maximum(rest, 1))[:, None, None]
    some = (rest > 0)[:, None, None]  # else lse may be −inf
    weight = jnp.where(some, jax.nn.sigmoid(jnp.where(some, logit - lse, 0)), 0)[..., None]
    out = near + weight * (far[:, None] - near)
    pilot_out = jnp.where(drawn.exists[..., None, None], drawn.pilot_out, 0)
    out = jax.vmap(lambda out, i, rows: out.at[i].set(rows, unique_indices=True))(out, drawn.pilot, pilot_out)
    return out.astype(result_dtype)


class Drawn(NamedTuple):
    """What was drawn of each example.

    Attributes:
      pilot, exists: positions of the pilot queries, int32 `[batch, ≤ pilots]`, and which of them there are.
      pilot_q, pilot_out: the pilots and their exact rows, `[batch, ≤ pilots, heads, dim]`.
      column, valid: positions of the keys, int32 `[batch, ≤ columns, heads]`, and which of them there are, bool
        `[batch, ≤ columns]`.
    """

    pilot: jax.Array
    exists: jax.Array
    pilot_q: jax.Array
    pilot_out: jax.Array
    column: jax.Array
    valid: jax.Array


def draw(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, draws: jax.Array, columns: int, pilots: int
) -> Drawn:
    """Draws pilots, and by what they see the columns; q, k and v are float32 at least, and v is zero at padding."""
    (batch, queries), keys = q.shape[:2], k.shape[1]
    real = jnp.ones((batch, keys), bool) if mask is None else mask
    real_queries = real if queries == keys else jnp.ones((batch, queries), bool)
    pilot, exists = sample_tokens(fold(draws, 0), real_queries, pilots)
    pilot_q = jnp.where(exists[..., None, None], take_tokens(q, pilot), 0)
    pilot_out, pilot_lse = flash_attention(pilot_q, k, v, mask=mask, return_lse=True)

    log_p = column_log_probabilities(pilot_q, jnp.where(exists[..., None], pilot_lse, jnp.inf), k, v)
    column = draw_by_weight(fold(draws, 1), log_p, mask, columns)
    return Drawn(pilot, exists, pilot_q, pilot_out, column, jnp.arange(column.shape[1]) < real.sum(1)[:, None])


def drawn_tokens(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, columns: int = 128, pilots: int = 128,
) -> jax.Array:  # fmt: skip
    """The pilots, then the drawn keys, see `Mixer.chosen`; arguments as in `skeinformer`."""
    mask = key_mask(mask, *k.shape[:2])
    q, k, v = (x.astype(jnp.promote_types(q.dtype, jnp.float32)) for x in (q, k, v))
    v = v if mask is None else jnp.where(mask[..., None, None], v, 0)
    drawn = draw(q, k, v, mask, evaluation_keys(len(k)), columns, pilots)
    keys = jnp.where(drawn.valid[..., None, None], tokens_at(k, drawn.column), 0)
    return jnp.concatenate([drawn.pilot_q, keys], axis=1)


def column_log_probabilities(pilot_q: jax.Array, pilot_lse: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """log of (Σ_j B_ji²)^½ ‖v_i‖ up to a constant, float32 `[batch, keys, heads]`, finite, without gradient.

    `pilot_q` is `[batch, pilots, heads, head_dim]`; `pilot_lse` is `[batch, pilots, heads]`, infinite for a missing
    pilot.
    """
    pilot_q, pilot_lse, k, v = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (pilot_q, pilot_lse, k, v))
    batch, pilots, heads, head_dim = pilot_q.shape
    keys, groups = k.shape[1:3]

    # On a CPU the weights of pilots × keys of one group of one example stay in the cache.
    def group(rows, lse, k):
        logits = jnp.matmul(rows * head_dim**-0.5, k.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.exp(2 * (logits - lse[:, None])).reshape(-1, pilots, keys).sum(1)

    rows = pilot_q.swapaxes(1, 2).reshape(batch * groups, -1, head_dim)
    lse = pilot_lse.swapaxes(1, 2).reshape(batch * groups, -1)
    squares = of_each(group, rows, lse, k.swapaxes(1, 2).reshape(-1, keys, head_dim))
    squares = squares.reshape(batch, heads, keys).swapaxes(1, 2)
    smallest = jnp.finfo(jnp.float32).tiny
    norms = repeat_heads(jnp.square(v).sum(-1), heads, "v")
    return 0.5 * (jnp.log(jnp.maximum(squares, smallest)) + jnp.log(jnp.maximum(norms, smallest)))


class Skeinformer(MultiHead):
    """Multi-head Skeinformer attention; options as in `skeinformer`, other arguments as in `MultiHead`.

    Raises:
      ValueError: `causal=True` (the pilots choose keys for the whole sequence), or an option out of its range.
    """

    paper = "Chen et al. 2021, arXiv 2112.05359"
    computes = "softmax attention from m sampled keys and the mean of the others; m pilot queries exact"
    cost = "n·m"
    function = staticmethod(skeinformer)
    exact = staticmethod(softmax)
    chosen = staticmethod(drawn_tokens)
    near_on = ("clustered", "imbalanced")
    draws = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"columns": budget, "pilots": budget}

    def state_numbers(self, length: int) -> int:
        return 2 * self.columns * self.heads * self.head_dim
