"""Longformer (Beltagy et al. 2020, arXiv 2004.05150): softmax over the nearest tokens and a few global tokens.

Let i and j be the ranks of two real tokens. Token i sees token j as in `local`, or if i or j is among the first
`global_tokens`. The pattern never becomes a dense mask, and padding does not count in distances.
"""

from typing import Any

import jax

from efficient_tx.attention.base.cache import Needed
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.block_sparse.mixer import BlockSparse
from efficient_tx.attention.block_sparse.patterns import (
    Window,
    last_queries,
    side_by_side,
    with_global_rows,
)
from efficient_tx.checks import at_least
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask, spread


def check_options(*, window, global_tokens):
    """Raises ValueError, one line, for the first option that is out of its range."""
    at_least(1, window=window)
    at_least(0, global_tokens=global_tokens)


@checked_by(check_options)
def longformer(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    q_global: jax.Array | None = None, k_global: jax.Array | None = None, v_global: jax.Array | None = None,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    window: int = 512, global_tokens: int = 1,
) -> jax.Array:  # fmt: skip
    """`local` attention; in addition the first `global_tokens` real tokens see all tokens and are seen by all.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      q_global, k_global, v_global: separate projections of the same tokens for the rows of the global tokens, as in the
        paper; shapes as q, k and v. None: the global tokens use q, k and v.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: unused, nothing is drawn.
      causal: a query sees no later token. Only then the numbers of queries and keys may differ: the last query is at
        the last real key (decoding).
      window: size of the local window in tokens.
      global_tokens: number of global tokens; 0 gives `local`.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at padding. Statistics are float32 at least.

    Raises:
      ValueError: an option out of its range, shapes that do not fit, one or two of the separate projections, or
        different numbers of queries and keys with them.
    """
    check_shapes(q, k, v)
    near = Window.of(window, causal, global_tokens)
    mask = key_mask(mask, *k.shape[:2])
    given = [x for x in (q_global, k_global, v_global) if x is not None]
    if len(given) not in (0, 3):
        raise ValueError(f"longformer got {len(given)} of q_global, k_global and v_global: pass all three or none")

    def attend(q):
        *arrays, front = side_by_side(mask, q, k, v, *given)
        out = near.attend(*arrays[:3], front, causal)
        if given or not causal:
            out = with_global_rows(out, *arrays[-3:], front, causal, global_tokens)
        return spread(out, mask)

    if q.shape[1] != k.shape[1]:
        return last_queries("longformer", q, k, v, mask, causal and not given, near, attend)
    return attend(q)


class Longformer(BlockSparse):
    """Multi-head `longformer` attention; options as in `longformer`, other arguments as in `MultiHead`.

    Args:
      global_projections: whether global tokens attend with query, key and value layers of their own, as in the paper,
        which doubles the parameters of these layers.
    """

    paper = "Beltagy et al. 2020, arXiv 2004.05150"
    computes = "softmax over the w nearest tokens and g global ones"
    cost = "n·(w + g)"
    function = staticmethod(longformer)

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"window": budget}

    def __init__(self, features: int, *, global_projections: bool = False, **common: Any):
        if global_projections:
            self.projections = ("q", "k", "v", "q_global", "k_global", "v_global")
            self.rotated = ("q", "k", "q_global", "k_global")
        super().__init__(features, **common)

    def stored(self) -> dict[str, Needed]:
        return dict.fromkeys("kv", Needed(self.global_tokens, self.window))

    def not_decoding(self) -> str | None:
        own = "q_global" in self.projections
        return super().not_decoding() or ("global_projections=True, use False" if own else None)
