"""Choice of landmarks: weighted sampling, ridge leverage scores of a kernel, Lloyd's k-means.

Each example and each head chooses independently, among its real tokens only. Nothing depends on the padded length.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from efficient_tx.numerics.each import of_each
from efficient_tx.numerics.factorisations import cholesky, solve_lower
from efficient_tx.numerics.random import sample_tokens

_dot = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def draw_by_weight(keys: jax.Array, log_weight: jax.Array, mask: jax.Array | None, count: int) -> jax.Array:
    """Positions of `count` real tokens for each head, drawn without replacement with probabilities ∝ exp(log_weight).

    The draw is the `count` largest values of log_weight plus Gumbel noise. The noise depends on a token's rank among
    the real tokens; real tokens are returned before padding.

    Args:
      keys: one key per example, `[batch]`.
      log_weight: `[batch, length, heads]`, finite at real tokens.
      mask: bool `[batch, length]`, True for real tokens; None means all are.
      count: number of tokens; at most `length` are returned.

    Returns:
      int32 `[batch, min(count, length), heads]`, distinct for each head.
    """
    length, heads = log_weight.shape[1:]
    log_weight = jax.lax.stop_gradient(log_weight).astype(jnp.float32)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (length, heads), jnp.float32))(keys)
    if mask is not None:
        rank = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        noise = jnp.take_along_axis(noise, rank[..., None], axis=1)
        log_weight = jnp.where(mask[..., None], log_weight, -jnp.inf)
    return jax.lax.top_k((log_weight + noise).swapaxes(1, 2), min(count, length))[1].swapaxes(1, 2)


def tokens_at(x: jax.Array, position: jax.Array) -> jax.Array:
    """Tokens of `x` `[batch, length, groups, dim]` at distinct positions of each head, `[batch, count, heads]`."""
    heads, groups = position.shape[2], x.shape[2]
    group = jnp.arange(heads) // (heads // groups)
    return jax.vmap(lambda x, i: x.at[i, group].get(unique_indices=heads == groups))(x, position)


def kernel_leverage(
    keys: jax.Array, x: jax.Array, mask: jax.Array, *,
    kernel: Callable[[jax.Array, jax.Array], jax.Array], pilots: int, ridge: float,
) -> jax.Array:  # fmt: skip
    """Upper bounds of the tokens' ridge leverage scores in their kernel matrix, from a uniform sample of tokens.

    With a sample P, the pilots, the score of a token is its residual κ(x, x) − κ(x, P) (κ(P, P) + ridge · I)⁻¹ κ(P, x):
    one level of the recursion of Musco and Musco (2017, arXiv 1605.07583). With the kernel matrix K of all tokens, the
    score is at least ridge · (K (K + ridge · I)⁻¹)_xx, with equality if all tokens are pilots.

    Args:
      keys: one key per example, `[batch]`, to draw the pilots, which all heads share.
      x: `[batch, length, heads, dim]`. No gradient flows through the scores: they serve to select tokens.
      mask: bool `[batch, length]`, True for real tokens.
      kernel: κ: `[..., n, dim]`, `[..., m, dim]` -> `[..., n, m]`, positive definite with κ(x, x) = 1.
      pilots: number of pilots.
      ridge: above 0.

    Returns:
      Scores in (0, 1], float32 `[batch, length, heads]`. Time length · pilots², memory linear in the length.
    """
    batch, length, heads, _ = x.shape
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    position, valid = sample_tokens(keys, mask, pilots)
    pilot, valid = jax.vmap(lambda x, i: x[i])(x, position).swapaxes(1, 2), valid[:, None, :, None]
    pilot = jnp.where(valid, pilot, 0)
    eye = jnp.eye(pilot.shape[2], dtype=x.dtype)
    # A missing pilot is a row of the identity and has no effect on the tokens below.
    core = jnp.where(valid & valid.mT, kernel(pilot, pilot), eye) + ridge * eye
    rows = jnp.broadcast_to(jnp.where(valid, eye, 0), core.shape)
    whiten = solve_lower(cholesky(core), rows)

    def head(pilot, whiten, x):
        return 1 - jnp.square(_dot(whiten, kernel(pilot, x))).sum(0)

    each = (pilot, whiten, x.swapaxes(1, 2))
    score = of_each(head, *(a.reshape(batch * heads, *a.shape[2:]) for a in each))
    return jnp.clip(score, jnp.finfo(score.dtype).eps, 1).reshape(batch, heads, length).swapaxes(1, 2)


def lloyd(x: jax.Array, mask: jax.Array, start: jax.Array, *, steps: int = 4) -> jax.Array:
    """The centres after `steps` steps of Lloyd's algorithm: each is the mean of its nearest tokens.

    No gradient flows through the assignments; it flows through the means of the last step. A centre without tokens
    keeps its place. Ties go to the first centre.

    Args:
      x: `[batch, length, heads, dim]`.
      mask: bool `[batch, length]`, True for real tokens.
      start: distinct positions of the tokens that are the initial centres, int32 `[batch, count, heads]`; positions of
        real tokens come first.
      steps: at least 1; each takes time length · count.

    Returns:
      `[batch, count, heads, dim]` in promote_types(dtype, float32); missing centres are zero if an example has fewer
      tokens than count.
    """
    batch, _, heads, dim = x.shape
    count = start.shape[1]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    x = jnp.where(mask[..., None, None], x, 0)
    valid = jnp.arange(count) < mask.sum(1)[:, None]
    centres = jax.lax.stop_gradient(jnp.where(valid[..., None, None], tokens_at(x, start), 0))

    def head(x, centres, mask, valid):
        def nearest(centres):
            closeness = _dot(centres, jax.lax.stop_gradient(x).T) - jnp.square(centres).sum(-1, keepdims=True) / 2
            closeness = jnp.where(valid[:, None], closeness, -jnp.inf)
            # The first of the largest, along the columns: on a CPU twenty times faster than argmax along the rows.
            best = closeness >= closeness.max(0)
            return jnp.where(mask, jnp.where(best, jnp.arange(count)[:, None], count).min(0), count)

        def means(x, centres):
            label = nearest(centres)
            size = jnp.zeros(count, x.dtype).at[label].add(1, mode="drop")[:, None]
            sums = jnp.zeros_like(centres).at[label].add(x, mode="drop")
            return jnp.where(size > 0, sums / jnp.maximum(size, 1), centres)

        still = jax.lax.stop_gradient(x)
        centres = jax.lax.fori_loop(0, steps - 1, lambda _, centres: means(still, centres), centres)
        return means(x, jax.lax.stop_gradient(centres))

    each = (x.swapaxes(1, 2), centres.swapaxes(1, 2), mask[:, None].repeat(heads, 1), valid[:, None].repeat(heads, 1))
    centres = of_each(head, *(a.reshape(batch * heads, *a.shape[2:]) for a in each))
    return centres.reshape(batch, heads, count, dim).swapaxes(1, 2)
