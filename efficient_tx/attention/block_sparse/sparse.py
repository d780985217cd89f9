"""Sparse Transformer (Child et al. 2019, arXiv 1904.10509): softmax over near tokens and a pattern of far ones.

With i and j the ranks of two real tokens, i sees j where

    "strided"   |i − j| ≤ ⌊stride / 2⌋, or stride divides i − j
    "fixed"     ⌊i / stride⌋ = ⌊j / stride⌋, or j mod stride ≥ stride − summary

and causal forms see j ≤ i of these, with the window before the query. Every head has both patterns ("merged").
"""

import jax

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
    """Two sparse patterns that together reach every token in two steps, at n·(stride + n / stride) for stride ~ √n.

    Args:
      q, k, v, mask, key, causal: as in `local`.
      pattern: "strided": `local` with a window of `stride`, and every token a multiple of `stride` away; "fixed": the
        query's own block of `stride` tokens, and the last `summary` tokens of every block.
      stride: the distance, or the length of a block.
      summary: of "fixed", from 1 to `stride`.

    Returns, Raises: as `local`.
    """
    mask = key_mask(mask, *k.shape[:2])
    chosen = Strided(stride, Window.of(stride, causal)) if pattern == "strided" else Fixed(stride, summary)
    if q.shape[1] != k.shape[1]:
        return last_queries("sparse", q, k, v, mask, causal, chosen)
    return spread(chosen.attend(*side_by_side(mask, q, k, v), causal), mask)


class Sparse(BlockSparse):
    """Multi-head `sparse` attention; options as the function, the other arguments as `MultiHead`."""

    paper = "Child et al. 2019, arXiv 1904.10509"
    computes = "softmax over the l nearest tokens and every l-th one"
    cost = "n·(l + n/l)"
    function = staticmethod(sparse)

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"stride": budget}
