"""Local attention (Parmar et al. 2018, arXiv 1802.05751): softmax over the nearest tokens.

Let i and j be the ranks of two real tokens (padding is removed first). Token i sees token j if |i − j| ≤ ⌊window / 2⌋.
In the causal form a token sees the last `window` tokens, itself included. Exact softmax if the window covers all
tokens. Unlike the published code of Long Range Arena, attention is local, not strided, and it is causal only on
request.
"""

import jax

from efficient_tx.attention.base.cache import Needed
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.block_sparse.mixer import BlockSparse
from efficient_tx.attention.block_sparse.patterns import Window, last_queries, side_by_side
from efficient_tx.checks import at_least
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.tokens.mask import key_mask, spread


def check_options(*, window):
    """Raises ValueError, one line, for the first option that is out of its range."""
    at_least(1, window=window)


@checked_by(check_options)
def local(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False, window: int = 128,
) -> jax.Array:  # fmt: skip
    """Attends to the real tokens at most window // 2 away; causal: to the last `window` tokens, the query's included.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: unused, nothing is drawn.
      causal: a query sees no later token. Only then the numbers of queries and keys may differ: the last query is at
        the last real key (decoding).
      window: size of the local window in tokens.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at padding. Statistics are float32 at least.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    check_shapes(q, k, v)
    near = Window.of(window, causal)
    mask = key_mask(mask, *k.shape[:2])

    def attend(q):
        return spread(near.attend(*side_by_side(mask, q, k, v), causal), mask)

    if q.shape[1] != k.shape[1]:
        return last_queries("local", q, k, v, mask, causal, near, attend)
    return attend(q)


class Local(BlockSparse):
    """Multi-head `local` attention; options as in `local`, other arguments as in `MultiHead`."""

    paper = "Parmar et al. 2018, arXiv 1802.05751"
    computes = "softmax over the w nearest tokens"
    cost = "n·w"
    function = staticmethod(local)

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"window": budget}

    def stored(self) -> dict[str, Needed]:
        return dict.fromkeys("kv", Needed(last=self.window))
