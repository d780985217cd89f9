"""Higher-order attention: a query attends to pairs of tokens with a trilinear score.

Over all pairs (Alman and Song 2023, arXiv 2310.04064, as attention with Kronecker products):

    out_i = Σ_jk softmax_jk(s_ijk) v_j ⊙ v2_k,        s_ijk = Σ_c q_ic k_jc k2_kc / √K

with k2 + 1/K and v2 + 1 in place of the projections k2 and v2, as in the published kernels (Roy et al., listing 1, with
the constants of pytorch/FBGEMM). So with small projections, as at the start of training, it is nearly attention to the
first token alone, out_i = Σ_j softmax_j(q_i·k_j / K^1.5) v_j; with `k2_bias=0, v2_bias=0` it is nearly 0.

Over pairs within windows (Roy et al. 2025, 2-simplicial attention, arXiv 2507.02754): i − j < window and
i − k < window2 if causal. `tensor` has windows; `tensor_exact` sees all pairs. Exact sums over n³ triples cannot be
computed in truly sub-cubic time unless the entries are small (Alman and Song), so long sequences need windows.

A trilinear score of three rotated factors does not depend on relative positions only, so "rope" is not supported.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.cache import Needed
from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.checks import at_least
from efficient_tx.kernels import pair_attention
from efficient_tx.kernels.shapes import check_rank


def check_options(*, window, window2):
    """Raises ValueError, one line, for the first option that is out of its range."""
    at_least(1, window=window, window2=window2)


@checked_by(check_options)
def tensor(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    k2: jax.Array, v2: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    window: int = 512, window2: int = 32, k2_bias: float | None = None, v2_bias: float = 1.0,
) -> jax.Array:  # fmt: skip
    """Exact attention to the pairs within two windows; memory is linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`, the first token of a pair; groups divides heads.
      v: `[batch, keys, groups, v_dim]`, values of the first token.
      k2: same shape as k, the second token of a pair.
      v2: same shape as v, values of the second token.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too. Windows count real tokens.
      key: unused, nothing is drawn.
      causal: token i sees tokens j, k ≤ i only; the last query is at the last real token.
      window: number of first tokens that a query sees: the latest ones if causal, else those around its own position,
        shifted inwards at the ends. If it is at least the number of real tokens, a query sees all.
      window2: number of second tokens that a query sees, selected in the same way.
      k2_bias: number added to the keys of the second token; None means 1 / head_dim.
      v2_bias: number added to the values of the second token.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero at masked queries and for a query without keys.
      Arithmetic is float32 at least.

    Raises:
      ValueError: a window below 1, or shapes that do not fit. Without `causal`, also different numbers of queries and
        keys with a window below the number of keys.
    """
    check_rank(q=q, k=k, v=v, k2=k2, v2=v2)
    del key
    queries, keys = q.shape[1], k.shape[1]
    if queries != keys and not causal and min(window, window2) < keys:
        raise ValueError(
            f"there are {queries} queries for {keys} keys, without common positions: tensor needs windows of {keys}"
        )
    k2, v2 = shifted(k2, k2_bias, v2, v2_bias)
    return pair_attention(q, k, v, k2, v2, pair=trilinear, mask=mask, causal=causal, windows=(window, window2))


def tensor_exact(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    k2: jax.Array, v2: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False,
    k2_bias: float | None = None, v2_bias: float = 1.0,
) -> jax.Array:  # fmt: skip
    """`tensor` over all pairs: time is cubic in the length, memory linear. Arguments and errors as in `tensor`."""
    check_rank(q=q, k=k, v=v, k2=k2, v2=v2)
    del key
    k2, v2 = shifted(k2, k2_bias, v2, v2_bias)
    return pair_attention(q, k, v, k2, v2, pair=trilinear, mask=mask, causal=causal)


def shifted(
    k2: jax.Array, k2_bias: float | None, v2: jax.Array, v2_bias: float
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Keys and values of the second token with their constants added, float32 at least; 0 leaves them as they are."""
    biases = 1 / k2.shape[-1] if k2_bias is None else k2_bias, v2_bias
    return tuple(
        x.astype(jnp.promote_types(x.dtype, jnp.float32)) + bias if bias else x for x, bias in zip((k2, v2), biases)
    )


def trilinear(q, k2):
    """The factor of k_j in the score, (q_i ⊙ k2_k) / √K, and the rest of the score, zero."""
    return q * k2 * q.shape[-1] ** -0.5, jnp.zeros(k2.shape[:-1], k2.dtype)


class Tensor(MultiHead):
    """Multi-head windowed higher-order attention; options as in `tensor`, other arguments as in `MultiHead`.

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
    formerly: ClassVar = {"k2_bias": 0.0, "v2_bias": 0.0}
    one_by_one = "on TPUs XLA reads and adds to the second tokens of one head after another"

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        window2 = max(1, round((budget / 2) ** 0.5))
        return {"window": budget // window2, "window2": window2}

    def __init__(self, features: int, *, positions: str | None = None, **common: Any):
        if positions in ("rope", "rope2d"):
            raise ValueError(f"Tensor's trilinear score would not be relative under {positions!r}: use other positions")
        super().__init__(features, positions=positions, **common)

    def stored(self) -> dict[str, Needed]:
        first, second = Needed(last=self.window), Needed(last=self.window2)
        return {"k": first, "v": first, "k2": second, "v2": second}
