"""Sparse Transformer (Child et al. 2019, arXiv 1904.10509): softmax over near tokens and a pattern of far tokens.

Let i and j be the ranks of two real tokens. Token i sees token j if

    "strided"   |i − j| ≤ ⌊stride / 2⌋, or stride divides i − j
    "fixed"     ⌊i / stride⌋ = ⌊j / stride⌋, or j mod stride ≥ stride − summary

The causal forms see only j ≤ i; the window is then before the query. Every head has both parts of its pattern
("merged").
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.block_sparse.mixer import BlockSparse
from efficient_tx.attention.block_sparse.patterns import (
    Fixed,
    Strided,
    Window,
    last_queries,
    side_by_side,
)
from efficient_tx.checks import OptionError, at_least, one_of
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask, spread

PATTERNS = ("strided", "fixed")


def check_options(*, pattern, stride, summary):
    """Raises ValueError, one line, for the first option that is out of its range."""
    one_of(PATTERNS, pattern=pattern)
    at_least(1, stride=stride, summary=summary)
    if pattern == "fixed" and summary > stride:
        raise OptionError("summary", summary, f"it must be at most the stride, {stride}")


@checked_by(check_options)
def sparse(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    pattern: str = "strided", stride: int = 128, summary: int = 8,
) -> jax.Array:  # fmt: skip
    """Attention with two sparse parts, which reach every token in two steps; time n·(stride + n / stride), stride ~ √n.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: unused, nothing is drawn.
      causal: a query sees no later token. Only then the numbers of queries and keys may differ: the last query is at
        the last real key (decoding).
      pattern: sparsity pattern, "strided" or "fixed". "strided": `local` with a window of `stride`, and every token at
        a multiple of `stride`. "fixed": the query's own block of `stride` tokens, and the last `summary` tokens of
        every block.
      stride: the distance of "strided", or the block length of "fixed".
      summary: number of last tokens of a block in "fixed", from 1 to `stride`.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at padding. Statistics are float32 at least.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    check_shapes(q, k, v)
    mask = key_mask(mask, *k.shape[:2])
    if 0 in (*q.shape[:2], k.shape[1]):
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    chosen = Strided(stride, Window.of(stride, causal)) if pattern == "strided" else Fixed(stride, summary)

    def attend(q):
        return spread(chosen.attend(*side_by_side(mask, q, k, v), causal), mask)

    if q.shape[1] != k.shape[1]:
        return last_queries("sparse", q, k, v, mask, causal, chosen, attend)
    return attend(q)


class Sparse(BlockSparse):
    """Multi-head `sparse` attention; options as in `sparse`, other arguments as in `MultiHead`."""

    paper = "Child et al. 2019, arXiv 1904.10509"
    computes = "softmax over the l nearest tokens and every l-th one"
    cost = "n·(l + n/l)"
    function = staticmethod(sparse)

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"stride": budget}
