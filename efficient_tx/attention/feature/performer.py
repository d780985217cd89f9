"""Performer (Choromanski et al. 2021, arXiv 2009.14794): softmax attention with positive orthogonal random features.

    exp(q·k / √d) = E φ(q)·φ(k),        φ(x) = exp(Ω x̂ − ‖x̂‖² / 2) / √m,        x̂ = x / d^¼

with m standard normal rows Ω, orthogonal in blocks of d (FAVOR+). The rest is as in `linear` attention.

Unlike the published code: nothing is added to the features. The published code subtracts from their exponents the
largest one over all keys, padding and future keys included, and then adds 1e-6, a bias. Here a query subtracts its own
largest exponent, and a key the largest exponent up to itself. If the latter grows, the state of past keys decays, so
that everything cancels exactly. The orthogonal matrices are uniformly distributed, unlike there (`numerics.features`),
and each example has its own draw.
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.exact.softmax import softmax
from efficient_tx.attention.feature.linear import FeatureAttention, Features, feature_attention
from efficient_tx.checks import OptionError
from efficient_tx.kernels.shapes import check_shapes
from efficient_tx.numerics.features import orthogonal_gaussian
from efficient_tx.numerics.random import evaluation_keys, example_keys

# Smallest sum of weights: its square is a normal float32. Only queries and keys too large for random features reach it.
FLOOR = 1e-18


def check_options(*, random_features):
    """Raises ValueError, one line, for the first option that is out of its range."""
    if random_features < 1:
        raise OptionError("random_features", random_features, "performer needs at least 1")


@checked_by(check_options)
def performer(
    q: jax.Array, k: jax.Array, v: jax.Array, *,
    mask: jax.Array | None = None, key: jax.Array | None = None, causal: bool = False, random_features: int = 256,
) -> jax.Array:  # fmt: skip
    """Approximates `softmax` with `random_features` random features: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: draws Ω: one key per example `[batch]`, or a single key, folded per example; None (evaluation) means the same
        fixed draw for every example. All heads share Ω.
      causal: query i sees keys j ≤ i only. If the numbers of queries and keys differ, the last query is at the last
        real key.
      random_features: number of random features, the rows of Ω.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. The arithmetic is float32 at
      least. The variance of the features grows with exp(‖q + k‖² / √head_dim). If the entries of q and k have a
      standard deviation above 1 or 2, the approximation is poor. Above about 6, all weights of a query may vanish; a
      lower bound on their sum then avoids division by zero and shrinks the output.

    Raises:
      ValueError: random_features is below 1, or shapes that do not fit.
    """
    check_shapes(q, k, v)
    batch, _, groups, dim = k.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    features = drawn_features(batch, groups, dim, dtype, key=key, causal=causal, count=random_features)
    return feature_attention(q, k, v, mask=mask, causal=causal, features=features)


def drawn_features(
    batch: int, groups: int, dim: int, dtype: jnp.dtype, *, key: jax.Array | None, causal: bool, count: int
) -> Features:  # fmt: skip
    """The features of `batch` examples with `groups` heads of keys, of width `dim`; other arguments as in `performer`.

    Their memory is the largest exponent of the keys before, `[batch, groups]`.
    """
    if key is None:
        # A constant of the compiled program, so that it is not drawn at every call.
        with jax.ensure_compile_time_eval():
            omega = orthogonal_gaussian(evaluation_keys(1)[0], count, dim, dtype)
    else:
        omega = jax.vmap(lambda key: orthogonal_gaussian(key, count, dim, dtype))(example_keys(key, batch))
    omega = jnp.broadcast_to(omega * dim**-0.25, (batch, count, dim))

    def exponents(x):
        return jnp.einsum("blhd,bfd->blhf", x, omega, precision=jax.lax.Precision.HIGHEST)

    def query_features(q):
        x = exponents(q)
        return jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))

    def key_features(k, real, peak):
        x = exponents(k) - jnp.square(k).sum(-1, keepdims=True) * (dim**-0.5 / 2)
        real = real[:, :, None]
        largest = jnp.where(real, jax.lax.stop_gradient(x.max(-1)), peak[:, None])
        reach = jax.lax.cummax(largest, axis=1) if causal else largest.max(axis=1, keepdims=True)
        before, peaks = peak[:, None], jnp.maximum(reach, peak[:, None])
        log_decay = jnp.concatenate([before, peaks[:, :-1]], axis=1) - peaks
        return jnp.exp(jnp.where(real[..., None], x - peaks[..., None], -jnp.inf)), log_decay, peaks[:, -1]

    # Finite, so that a piece without keys does not compute inf − inf.
    nothing = jnp.full((batch, groups), jnp.finfo(dtype).min / 2, dtype)
    return Features(count, query_features, key_features, nothing, FLOOR)


class Performer(FeatureAttention):
    """Multi-head Performer attention; options as in `performer`, other arguments as in `MultiHead`.

    Raises:
      ValueError: random_features is below 1.
    """

    paper = "Choromanski et al. 2021, arXiv 2009.14794"
    computes = "`softmax` through m positive orthogonal random features"
    cost = "n·m"
    function = staticmethod(performer)
    exact = staticmethod(softmax)
    near_on = ("imbalanced",)
    draws = True

    @staticmethod
    def within(budget: int) -> dict[str, int]:
        return {"random_features": budget}

    def features_of(self, batch: int, dtype: jnp.dtype) -> Features:
        return drawn_features(
            batch, self.heads, self.head_dim, dtype, key=None, causal=True, count=self.random_features
        )
