"""Higher-order attention: a query attends to pairs of tokens by a trilinear score.

Alman and Song 2023 (arXiv 2310.04064), as attention by Kronecker products, over all pairs:

    out_i = Σ_jk softmax_jk(s_ijk) v_j ⊙ v2_k,        s_ijk = Σ_c q_ic k_jc k2_kc / √K

and Roy et al. 2025 (2-simplicial attention, arXiv 2507.02754) over pairs within windows, i − j < window and
i − k < window2 if causal. That is `tensor`; `tensor_exact` sees all pairs. Exact sums over n³ triples cannot be had in
truly sub-cubic time unless entries are small (same paper), so windows are what makes long sequences affordable.

A trilinear score is not invariant under rotations of its three factors by their positions, so there is no "rope".
"""

from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.checks import at_least
from efficient_tx.kernels import pair_attention


def check_options(*, window, window2):
    """Raises ValueError, one line, for the first option that is out of its range."""
    at_least(1, window=window, window2=window2)


@checked_by(check_options)
def tensor(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    k2: jax.Array, v2: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    window: int = 512, window2: int = 32,
) -> jax.Array:  # fmt: skip
    """Attends to the pairs within two windows, exactly; memory is linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`, the first token of a pair; groups divides heads.
      v: `[batch, keys, groups, v_dim]`, its values.
      k2: as k, the second token.
      v2: as v, its values.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too. Windows count real tokens.
      key: unused, nothing is drawn.
      causal: token i sees tokens j, k ≤ i only; the last query stands at the last real token.
      window: how many first tokens a query sees: the latest if causal, else those around its own position, moved
        inwards at the ends. From the number of real tokens on, all.
      window2: the same for the second tokens.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at masked queries and for a query without keys.
      Arithmetic is float32 at least.

    Raises:
      ValueError: a window below 1, shapes that do not fit, or, without `causal`, other numbers of queries and keys
        with a window below the latter.
    """
    del key
    queries, keys = q.shape[1], k.shape[1]
    if queries != keys and not causal and min(window, window2) < keys:
        raise ValueError(
            f"there are {queries} queries for {keys} keys, without common positions: tensor needs windows of {keys}"
        )
    return pair_attention(q, k, v, k2, v2, pair=trilinear, mask=mask, causal=causal, windows=(window, window2))


def tensor_exact(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    k2: jax.Array, v2: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """`tensor` over all pairs: time is cubic in the length, memory linear. Arguments and errors as there."""
    del key
    return pair_attention(q, k, v, k2, v2, pair=trilinear, mask=mask, causal=causal)


def trilinear(q, k2):
    """Against k_j: (q_i ⊙ k2_k) / √K, and nothing besides."""
    return q * k2 * q.shape[-1] ** -0.5, jnp.zeros(k2.shape[:-1], k2.dtype)


class Tensor(MultiHead):
    """Multi-head windowed higher-order attention; options as `tensor`, the other arguments as `MultiHead`.

    Raises:
      ValueError: a window below 1, or rotary positions.
    """

    paper = "Alman and Song 2023, arXiv 2310.04064; Roy et al. 2025, arXiv 2507.02754"
    computes = "softmax over pairs of tokens within two windows, trilinear scores"
    cost = "n·w·w₂"
    function = staticmethod(tensor)
    exact = staticmethod(tensor_exact)
    projections = ("q", "k", "v", "k2", "v2")
    windowed = True
    has_positions = False

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        window2 = max(1, round((budget / 2) ** 0.5))
        return {"window": budget // window2, "window2": window2}

    def __init__(self, features: int, *, positions: str | None = None, **common: Any):
        if positions in ("rope", "rope2d"):
            raise ValueError(f"Tensor's trilinear score would not be relative under {positions!r}: use other positions")
        super().__init__(features, positions=positions, **common)

    def state_numbers(self, length: int) -> int:
        return 2 * (min(self.window, length) + min(self.window2, length)) * self.heads * self.head_dim
