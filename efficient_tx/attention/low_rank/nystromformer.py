"""Nyströmformer (Xiong et al. 2021, arXiv 2102.03902): softmax attention through segment means, linear in length.

Q̃ and K̃ are the means of m consecutive segments of the queries and of the keys; each softmax is over rows:

    out = softmax(Q K̃ᵀ / √K) · A⁺ · softmax(Q̃ Kᵀ / √K) V + conv(V),        A = softmax(Q̃ K̃ᵀ / √K).

A⁺ is six steps of an iteration for the pseudo-inverse. The iteration is not meant to converge: A is not positive
definite, and the inverses of its small singular values would dominate the output.

Unlike the published code: segments divide the real tokens, of any number, instead of the padded sequence; a landmark
without tokens is no column of a softmax; the iteration starts from each matrix's own norms instead of one maximum over
batch and heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.exact.softmax import softmax
from efficient_tx.checks import OptionError, at_least
from efficient_tx.kernels import flash_attention
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.numerics.spd import newton_inverse
from efficient_tx.tokens.depthwise import depthwise, initial_weights
from efficient_tx.tokens.mask import key_mask, repeat_heads
from efficient_tx.tokens.segments import segment_means


def check_options(*, landmarks, iterations):
    """Raises ValueError, one line, for the first option that is out of its range."""
    if landmarks < 1:
        raise OptionError("landmarks", landmarks, "nystromformer needs at least 1")
    at_least(1, iterations=iterations)


@checked_by(check_options)
def nystromformer(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, conv: jax.Array | None = None,
    landmarks: int = 128, iterations: int = 6,
) -> jax.Array:  # fmt: skip
    """Approximates `softmax` with `landmarks` segment means: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens. With as many queries as keys it marks
        the queries too; otherwise all queries are real.
      key: unused, nothing is drawn.
      conv: weights `[size, heads]` of the depthwise convolution of the values, size odd; None means none. It requires
        as many queries as keys.
      landmarks: number of segment means of the queries and of the keys; with fewer tokens each token is its own
        landmark.
      iterations: steps of the iteration for the pseudo-inverse; more steps are not better.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for an example without keys. The arithmetic is float32
      at least.

    Raises:
      ValueError: an option out of its range, or shapes that do not fit.
    """
    check_shapes(q, k, v)
    del key
    batch, queries, _, head_dim = q.shape
    keys = k.shape[1]
    if conv is not None and queries != keys:
        raise ValueError(f"there are {queries} queries and {keys} keys: conv needs a value for each query")
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    mask = key_mask(mask, batch, keys)
    if 0 in (batch, queries, keys):
        return jnp.zeros((*q.shape[:3], v.shape[3]), q.dtype)

    (q_means, q_real), (k_means, k_real) = means_of(q, k, mask, landmarks)
    sums = flash_attention(q_means, k.astype(dtype), v.astype(dtype), mask=mask)

    logits = jnp.einsum("bihd,bjhd->bhij", q_means, k_means, precision=jax.lax.Precision.HIGHEST) * head_dim**-0.5
    column = k_real[:, None, None, :]
    core = jax.nn.softmax(jnp.where(column, logits, jnp.finfo(dtype).min), axis=-1)
    # Missing landmarks are zero rows and columns of the core, and so of its pseudo-inverse.
    core = jnp.where(q_real[:, None, :, None] & column, core, 0)
    inverse, _ = newton_inverse(core, iterations)
    weights = jnp.einsum("bhij,bjhd->bihd", inverse, sums, precision=jax.lax.Precision.HIGHEST)
    out = flash_attention(q, k_means, weights, mask=k_real)
    return out if conv is None else out + depthwise(v, conv, mask).astype(out.dtype)


def means_of(q: jax.Array, k: jax.Array, mask: jax.Array | None, landmarks: int) -> list[tuple[jax.Array, jax.Array]]:
    """The segment means of queries and of keys, `[batch, ≤ landmarks, heads, head_dim]`, each with its mask."""
    heads, queries, keys = q.shape[2], q.shape[1], k.shape[1]
    if queries == keys:
        means, real = segment_means(jnp.concatenate([q, k], axis=2), mask, min(landmarks, keys))
        parts = [(means[:, :, :heads], real), (means[:, :, heads:], real)]
    else:
        parts = [segment_means(q, None, min(landmarks, queries)), segment_means(k, mask, min(landmarks, keys))]
    return [(repeat_heads(means, heads, "k"), real) for means, real in parts]


def landmark_tokens(
    q: jax.Array, k: jax.Array, *, mask: jax.Array | None = None, landmarks: int = 128
) -> jax.Array:  # fmt: skip
    """The segment means of the queries, then of the keys, see `Mixer.chosen`; arguments as in `nystromformer`."""
    parts = means_of(q, k, key_mask(mask, *k.shape[:2]), landmarks)
    return jnp.concatenate([means for means, _ in parts], axis=1)


class Nystromformer(MultiHead):
    """Multi-head Nyströmformer attention; options as in `nystromformer`, other arguments as in `MultiHead`.

    Args:
      value_conv: size of the depthwise convolution of the values, odd (35 in the paper's runs on Long Range Arena); 0
        means none.
      conv: size of the depthwise convolution of each projection, see `MultiHead`; 0 means none.

    Raises:
      ValueError: `causal=True` (the means see the whole sequence), or an option out of its range.
    """

    paper = "Xiong et al. 2021, arXiv 2102.03902"
    computes = "softmax attention through m segment means, and a convolution of the values"
    cost = "n·m + m³"
    function = staticmethod(nystromformer)
    exact = staticmethod(softmax)
    chosen = staticmethod(landmark_tokens)
    near_on = ("imbalanced",)

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"landmarks": budget}

    def __init__(self, features: int, *, value_conv: int = 35, rngs: nnx.Rngs, **common: Any):
        super().__init__(features, rngs=rngs, **common)
        self.conv = nnx.Param(initial_weights((value_conv,), self.heads, rngs)) if value_conv else None

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:  # fmt: skip
        return super().attend(q, k, v, mask=mask, key=key, conv=None if self.conv is None else self.conv[...])

    def state_numbers(self, length: int) -> int:
        return 2 * self.landmarks * self.heads * self.head_dim
