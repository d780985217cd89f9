"""Shared by both forms of `lev`: attention to a few keys of each example, by softmax or by |x|^p, and the options."""

import jax
import jax.numpy as jnp

from efficient_tx.checks import OptionError, one_of
from efficient_tx.kernels import flash_attention

HIGHEST = jax.lax.Precision.HIGHEST
WEIGHTS = ("softmax", "polynomial")


def attend_to(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array, *,
    attention: str, p: float = 2.0, gram: jax.Array | None = None, own: int = 0,
) -> jax.Array:  # fmt: skip
    """Attention of all queries to the same keys; the last `own` keys are the queries' own tokens and seen causally.

    Args:
      q: `[batch, queries, heads, head_dim]`, float32 or float64 as the others.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      seen: bool `[batch, keys]`: which keys exist.
      attention: "softmax", or "polynomial": weights |q·k|^p divided by their sum.
      p: power of the polynomial weights.
      gram: Σ k kᵀ, `[batch, groups, head_dim, head_dim]`, over all keys that a query may see, selected or not, without
        the last `own` keys. With it (p = 2) the polynomial weights are divided by their exact sum over all keys.
      own: 0 (not causal) or the number of queries.

    Returns:
      `[batch, queries, heads, v_dim]`, zero for a query without keys.
    """
    if attention == "softmax":
        return flash_attention(q, k, v, mask=seen, causal=own > 0)
    batch, queries, heads, head_dim = q.shape
    keys, groups = k.shape[1:3]
    q = q.reshape(batch, queries, groups, heads // groups, head_dim)
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", q, k, precision=HIGHEST)
    pairs = seen[:, None, None, None]
    if own:
        pairs = pairs & (jnp.arange(keys) <= jnp.arange(queries)[:, None] + keys - own)
    # A common factor of the scores does not change the weights. With largest score 1, no power overflows.
    scores = jnp.where(pairs, jnp.abs(scores), 0)
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    peak = jnp.where(peak > 0, peak, 1)
    weights = (scores / peak) ** p
    if gram is None:
        total = weights.sum(-1, keepdims=True)
    else:
        scaled = q / jnp.moveaxis(peak, 3, 1)
        total = jnp.einsum("bqgrd,bgde,bqgre->bgrq", scaled, gram, scaled, precision=HIGHEST)[..., None]
        total += weights[..., keys - own :].sum(-1, keepdims=True)
    weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0)
    return jnp.einsum("bgrqk,bkgd->bqgrd", weights, v, precision=HIGHEST).reshape(batch, queries, heads, -1)


def gram_matrix(k: jax.Array) -> jax.Array:
    """Σ k kᵀ of `[..., keys, groups, head_dim]`: `[..., groups, head_dim, head_dim]`."""
    return jnp.einsum("...kgd,...kge->...gde", k, k, precision=HIGHEST)


def check_options(*, budget, p, attention, recent, ridge, causal):
    """Raises ValueError, one line, for the first option that is out of its range."""
    if budget < (2 if causal else 1):
        raise OptionError("budget", budget, "it must be at least 1, and 2 for a causal form")
    if not p >= 1:
        raise OptionError("p", p, "it must be at least 1")
    if causal and p != 2:
        raise OptionError("p", p, "the causal form scores by leverage, set p=2")
    one_of(WEIGHTS, attention=attention)
    if recent is not None and not 1 <= recent < budget:
        raise OptionError("recent", recent, f"it must be at least 1 and below the budget, {budget}")
    if not ridge > 0:
        raise OptionError("ridge", ridge, "it must be above 0, for prefixes shorter than head_dim are singular")


def newest(budget: int, recent: int | None) -> int:
    """The number of newest keys in the budget: `recent`, or half of the budget."""
    return budget // 2 if recent is None else recent
