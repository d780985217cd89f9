"""Performer (Choromanski et al. 2021, arXiv 2009.14794): softmax attention through positive orthogonal random features.

    exp(q·k / √d) = E φ(q)·φ(k),        φ(x) = exp(Ω x̂ − ‖x̂‖² / 2) / √m,        x̂ = x / d^¼

with m rows Ω, each standard normal, orthogonal in blocks of d (FAVOR+); then as `linear` attention.

Unlike the published code: nothing is added to the features. It adds 1e-6, a bias, after taking from their exponents the
largest over all keys, padded and future ones included. Here each query takes its own largest exponent, and each key the
largest up to it: the state of past keys fades when that grows, so that all of it cancels exactly. The orthogonal
matrices are uniformly distributed, which theirs are not (`numerics.features`), and a draw belongs to an example.
"""

import jax
import jax.numpy as jnp

from efficient_tx.attention.base.multihead import MultiHead
from efficient_tx.attention.base.options import checked_by
from efficient_tx.attention.exact.softmax import softmax
from efficient_tx.attention.feature.linear import feature_attention
from efficient_tx.checks import OptionError
from efficient_tx.numerics.features import orthogonal_gaussian
from efficient_tx.numerics.random import evaluation_keys, example_keys

# The least sum of weights: its square is a float32. Only queries and keys too large for random features come near.
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
    """Approximates `softmax` with `random_features` features: time and memory are linear in the length.

    Args:
      q: `[batch, queries, heads, head_dim]`.
      k: `[batch, keys, groups, head_dim]`; groups divides heads.
      v: `[batch, keys, groups, v_dim]`.
      mask: bool `[batch, keys]` or `[batch, 1, 1, keys]`, True for real tokens; with as many queries as keys it marks
        the queries too.
      key: draws Ω: one key per example `[batch]`, or one, folded per example; None (evaluation) is a fixed draw for
        every example. All heads share it.
      causal: query i sees keys j ≤ i only; with another number of queries the last one stands at the last real key.
      random_features: how many rows Ω has.

    Returns:
      `[batch, queries, heads, v_dim]` in the dtype of q; zero for a query without keys. The arithmetic is float32 at
      least. The variance of the features grows with exp(‖q + k‖² / √head_dim): entries of a standard deviation above
      1 or 2 make a poor approximation, and beyond 6 or so a query may miss all features of the keys, whose sum is then
      kept from zero by a floor that shrinks the output.

    Raises:
      ValueError: no random features, or shapes that do not fit.
    """
    batch, _, groups, dim = k.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    if key is None:
        # A constant of the program, not to be drawn again at every call.
        with jax.ensure_compile_time_eval():
            omega = orthogonal_gaussian(evaluation_keys(1)[0], random_features, dim, dtype)
    else:
        omega = jax.vmap(lambda key: orthogonal_gaussian(key, random_features, dim, dtype))(example_keys(key, batch))
    omega = jnp.broadcast_to(omega * dim**-0.25, (batch, random_features, dim))

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

    # Finite, so that a piece without keys has no inf − inf.
    nothing = jnp.full((batch, groups), jnp.finfo(dtype).min / 2, dtype)
    return feature_attention(
        q, k, v, mask=mask, causal=causal, features=random_features, floor=FLOOR,
        query_features=query_features, key_features=key_features, memory=nothing,
    )  # fmt: skip


class Performer(MultiHead):
    """Multi-head Performer attention; options as `performer`, the other arguments as `MultiHead`.

    Raises:
      ValueError: no random features.
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

    def state_numbers(self, length: int) -> int:
        return self.heads * self.random_features * (self.head_dim + 1)
