"""cosFormer against its dense formula, and its positions."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention.cosformer import cosformer as uncompiled

cosformer = jax.jit(uncompiled, static_argnames=("max_len", "causal"))
M = 160


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of at most 64 tokens, so that short sequences have several, the last one ragged."""
    monkeypatch.setattr(sys.modules["efficient_tx.attention.linear"], "PIECE", 1)


def arrays(seed, length, *, heads=4, groups=2, dim=6, v_dim=3):
    r = np.random.default_rng(seed)
    shapes = (2, length, heads, dim), (2, length, groups, dim), (2, length, groups, v_dim)
    return [r.normal(size=shape) for shape in shapes]


def dense(q, k, v, mask, causal):
    """All weights at once, the cosine of each pair's distance in real tokens; in JAX for its gradients."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    rank = np.cumsum(mask, axis=1)
    near = np.cos(np.pi / 2 * (rank[:, :, None] - rank[:, None, :]) / M)[:, None]
    weights = jnp.einsum("bihf,bjhf->bhij", jnp.maximum(q, 0), jnp.maximum(k, 0)) * near
    weights = jnp.where(mask[:, None, None, :] & (np.tri(q.shape[1], dtype=bool) if causal else True), weights, 0)
    return jnp.einsum("bhij,bjhv->bihv", weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6), v)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_dense_formula_and_its_gradients(causal):
    """Three pieces, padding anywhere, grouped heads, values of another width; in float64."""
    inputs = arrays(0, 150)
    mask = np.random.default_rng(1).random((2, 150)) < 0.7
    w = np.random.default_rng(2).normal(size=(2, 150, 4, 3)) * mask[:, :, None, None]

    def loss(inputs, ours):
        out = uncompiled(*inputs, max_len=M, mask=mask, causal=causal) if ours else dense(*inputs, mask, causal)
        return jnp.vdot(out, w), out

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
        (_, ours), gradients = run(inputs, True)
        (_, expected), expected_gradients = run(inputs, False)
    ours, expected = np.asarray(ours), np.asarray(expected)
    np.testing.assert_allclose(ours[mask], expected[mask], atol=1e-12)  # means of at most 150 values
    for got, want in zip(gradients, expected_gradients):
        np.testing.assert_allclose(got, want, atol=1e-10)  # some sums of weights are small


def test_the_last_query_stands_at_the_last_real_key():
    """Decoding: a cache of 70 places of which some are real, in any pattern. Its rows are those of the whole."""
    q, k, v = arrays(0, 70)
    mask = np.random.default_rng(1).random((2, 70)) < 0.5
    real = np.stack([np.flatnonzero(row)[-5:] for row in mask])
    rows = np.arange(2)[:, None]
    with jax.enable_x64(True):
        whole = np.asarray(cosformer(q, k, v, max_len=M, mask=mask, causal=True))
        ours = cosformer(q[rows, real], k, v, max_len=M, mask=mask, causal=True)
    np.testing.assert_allclose(ours, whole[rows, real], atol=1e-12)


def test_queries_without_keys_give_zero():
    q, k, v = (x.astype(np.float32) for x in arrays(0, 20))
    for causal in (False, True):
        out = cosformer(q, k, v, max_len=M, mask=np.zeros((2, 20), bool), causal=causal)
        assert (np.asarray(out) == 0).all()


def test_what_has_no_positions_is_refused():
    q, k, v = arrays(0, 20)
    with pytest.raises(ValueError, match="5 queries and 20 keys: it needs positions, so use causal=True"):
        uncompiled(q[:, :5], k, v, max_len=M)
    with pytest.raises(ValueError, match="length is 20, but cosformer was built for max_len=19"):
        uncompiled(q, k, v, max_len=19)
