"""Performer against the dense formula with the same draws, softmax in the limit, and the published algorithm."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.attention.feature.performer import Performer
from efficient_tx.attention.feature.performer import performer as uncompiled
from efficient_tx.numerics.features import orthogonal_gaussian
from tests.support.samples import attention_inputs, check_equal, clusters

performer = jax.jit(uncompiled, static_argnames=("causal", "random_features"))
arrays = partial(attention_inputs, heads=4, dim=6, v_dim=3)
FEATURES = 16


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of at most 64 tokens, so that short sequences have several, the last one ragged."""
    monkeypatch.setattr(sys.modules["efficient_tx.attention.feature.linear"], "PIECE", 1)


def draws(keys, dim, dtype):
    return jnp.stack([orthogonal_gaussian(key, FEATURES, dim, dtype) for key in keys])


def dense(q, k, v, omega, mask, causal):
    """All weights Σ_f φ_f(q) φ_f(k) at once, their logarithms by log-sum-exp, in float64."""
    dim = q.shape[-1]
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))

    def log_features(x):
        x = x / dim**0.25
        return jnp.einsum("blhd,bfd->bhlf", x, omega) - jnp.square(x).sum(-1).swapaxes(1, 2)[..., None] / 2

    logits = jax.nn.logsumexp(log_features(q)[:, :, :, None] + log_features(k)[:, :, None], axis=-1)
    keep = mask[:, None, None, :] & (jnp.tri(q.shape[1], dtype=bool) if causal else True)
    weights = jax.nn.softmax(jnp.where(keep, logits, -1e300), axis=-1)
    return jnp.einsum("bhij,bjhv->bihv", weights, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.first(1)
def test_equals_the_dense_formula_and_its_gradients(small_pieces, causal):
    """Three pieces, padding anywhere, grouped heads, values of another width, a draw per example; in float64."""
    mask = np.random.default_rng(1).random((3, 150)) < 0.7
    mask[:, 0] = True  # so that every causal query has a key
    mask[2] = False
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.enable_x64(True):
        omega = draws(keys, 6, jnp.float64)
    ours = check_equal(
        lambda *arrays: uncompiled(*arrays, mask=mask, key=keys, causal=causal, random_features=FEATURES),
        lambda *arrays: dense(*arrays, omega, mask, causal),
        arrays(0, 150, 150, batch=3),
        mask,
        gradient_atol=1e-11,
    )
    assert (np.asarray(ours)[2] == 0).all()  # queries without keys


def test_exponents_beyond_float32(small_pieces):
    """Keys of norm 25 fading to 5 over the sequence: features from e⁻¹³⁰ on, the largest one growing on and on."""
    q, k, v = (x.astype(np.float32) for x in arrays(0, 150, 150))
    k *= np.linspace(10, 2, 150, dtype=np.float32)[:, None, None]
    keys, mask = jax.random.split(jax.random.key(0), 2), np.ones((2, 150), bool)
    ours = performer(q, k, v, key=keys, causal=True, random_features=FEATURES)
    omega = np.asarray(draws(keys, 6, jnp.float32), np.float64)
    with jax.enable_x64(True):
        expected = jax.jit(dense, static_argnums=5)(*(x.astype(np.float64) for x in (q, k, v)), omega, mask, True)
    # An exponent of 130 has a rounding error of 1e-5 in float32, and so has its exponential.
    np.testing.assert_allclose(ours, expected, atol=1e-4)


# Of a size for which random features work: their variance grows with exp(‖q + k‖² / √d).
KINDS = {
    "random": lambda r, n, dim: [0.5 * r.normal(size=(n, dim)) for _ in range(2)],
    "clustered": lambda r, n, dim: np.split(0.5 * clusters(r, (2 * n, dim), [1 / 8] * 8, 0.3, scale=1), 2),
    "imbalanced": lambda r, n, dim: np.split(0.5 * clusters(r, (2 * n, dim), [0.96] + [0.01] * 4, 0.2, scale=1), 2),
}


def published(q, k, v, count, rng):
    """One head `[length, dim]` with independent features, 1e-6 added to each of them."""
    dim = q.shape[-1]
    omega = rng.normal(size=(count, dim))
    a, b = (x @ omega.T / dim**0.25 - np.square(x).sum(-1, keepdims=True) / (2 * dim**0.5) for x in (q, k))
    a, b = np.exp(a - a.max(-1, keepdims=True)) + 1e-6, np.exp(b - b.max()) + 1e-6
    return a @ (b.T @ v) / (a @ b.sum(0))[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_error_falls_with_the_features_and_is_at_most_the_published_one(kind):
    """Mean over 128 draws of the relative error to softmax: it falls like √features; orthogonality takes 10 % off."""
    r = np.random.default_rng(0)
    q, k = KINDS[kind](r, 128, 16)
    v = r.normal(size=(128, 16))
    weights = np.exp(q @ k.T / 4)
    expected = weights @ v / weights.sum(-1, keepdims=True)

    def error(out):
        return np.linalg.norm(out - expected) / np.linalg.norm(expected)

    batch = [np.broadcast_to(x.astype(np.float32), (128, *x.shape))[:, :, None] for x in (q, k, v)]
    ours = [
        np.mean([error(out[:, 0]) for out in np.asarray(performer(*batch, key=jax.random.key(0), random_features=m))])
        for m in (16, 64, 256)
    ]
    assert ours[1] < 0.75 * ours[0]
    assert ours[2] < 0.75 * ours[1]
    assert ours[1] <= np.mean([error(published(q, k, v, 64, r)) for _ in range(128)])


@pytest.mark.slow
def test_a_decoded_row_is_that_of_the_whole():
    q, k, v = arrays(0, 20, 20)
    with jax.enable_x64(True):
        whole = performer(q, k, v, causal=True, random_features=FEATURES)
        mask = np.broadcast_to(np.arange(20) <= 13, (2, 20))
        row = performer(q[:, 13:14], k, v, mask=mask, causal=True, random_features=FEATURES)
    np.testing.assert_allclose(row[:, 0], whole[:, 13], atol=1e-13)


@pytest.mark.quick
def test_no_features_are_refused():
    with pytest.raises(ValueError, match="random_features is 0: performer needs at least 1"):
        Performer(8, heads=2, random_features=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="random_features is 0"):
        uncompiled(*arrays(0, 8, 8), random_features=0)
