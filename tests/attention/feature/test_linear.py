"""Linear attention against the dense formula in NumPy, and where queries stand."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention.feature.linear import linear as uncompiled
from tests.support.samples import attention_inputs, check_equal

module = sys.modules["efficient_tx.attention.feature.linear"]
linear = jax.jit(uncompiled, static_argnames="causal")
arrays = partial(attention_inputs, heads=4, dim=6, v_dim=3)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of at most 64 tokens, so that short sequences have several, the last one ragged."""
    monkeypatch.setattr(module, "PIECE", 1)


def dense(q, k, v, mask=None, causal=False):
    """All weights at once, in JAX for its gradients; as many queries as keys."""

    def features(x):
        return jnp.where(x > 0, x + 1, jnp.exp(x))

    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    weights = jnp.einsum("bihf,bjhf->bhij", features(q), features(k))
    if mask is not None:
        weights = jnp.where(mask[:, None, None, :], weights, 0)
    if causal:
        weights = jnp.tril(weights)
    total = weights.sum(-1, keepdims=True)
    return jnp.einsum("bhij,bjhv->bihv", weights / jnp.where(total == 0, 1, total), v)


@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_dense_formula_and_its_gradients(causal):
    """Three pieces, padding anywhere, grouped heads, values of another width; in float64."""
    mask = np.random.default_rng(1).random((2, 150)) < 0.7
    check_equal(
        lambda *arrays: uncompiled(*arrays, mask=mask, causal=causal),
        lambda *arrays: dense(*arrays, mask=mask, causal=causal),
        arrays(0, 150, 150),
        mask,
        gradient_atol=1e-11,
    )


@pytest.mark.parametrize("queries", [1, 5])
def test_the_last_query_stands_at_the_last_real_key(queries):
    """Decoding: a cache of 70 places of which some are real, in any pattern. All rows are those of the whole."""
    _, k, v = arrays(0, 70, 70)
    q = arrays(3, 70, 70)[0]
    mask = np.random.default_rng(1).random((2, 70)) < 0.5
    with jax.enable_x64(True):
        whole = linear(q, k, v, mask=mask, causal=True)
        real = np.stack([np.flatnonzero(row)[-queries:] for row in mask])
        rows = np.arange(2)[:, None]
        ours = linear(q[rows, real], k, v, mask=mask, causal=True)
    np.testing.assert_allclose(ours, whole[rows, real], atol=1e-13)


@pytest.mark.quick
def test_a_query_in_front_of_all_keys_gives_zero():
    q, k, v = (x.astype(np.float32) for x in arrays(0, 8, 6))
    mask = np.arange(6) < np.array([[5], [0]])
    out = np.asarray(linear(q, k, v, mask=mask, causal=True))
    assert (out[0, :3] == 0).all()
    assert (np.abs(out[0, 3:]).max(-1) > 0).all()
    assert (out[1] == 0).all()
    assert (np.asarray(linear(q, k, v, mask=mask))[1] == 0).all()


def test_other_queries_than_keys_see_all_of_them():
    q, k, v = arrays(0, 100, 70)
    mask = np.random.default_rng(1).random((2, 70)) < 0.5
    with jax.enable_x64(True):
        ours, expected = (f(q, k, v, mask=mask) for f in (linear, dense))
    np.testing.assert_allclose(ours, expected, atol=1e-13)


@pytest.mark.quick
def test_weights_sum_to_one_and_forget_nothing_in_float32():
    """Constant values stay constant over 10 000 tokens, causal and not: numerators and denominators are one sum."""
    q, k, _ = (x.astype(np.float32) for x in arrays(0, 10000, 10000, heads=1, groups=1, batch=1))
    v = np.full((1, 10000, 1, 2), 3.0, np.float32)
    for causal in (False, True):
        np.testing.assert_allclose(linear(q, k, v, causal=causal), np.full_like(v, 3), rtol=1e-5)


@pytest.mark.slow
def test_nan_in_padding_stays_there():
    mask = np.arange(20) < np.array([[20], [13]])
    inputs = [np.where(mask[:, :, None, None], x, np.nan).astype(np.float32) for x in arrays(0, 20, 20)]
    for causal in (False, True):
        loss = jax.grad(lambda inputs: uncompiled(*inputs, mask=mask, causal=causal).sum())  # noqa: B023
        assert all(np.isfinite(x).all() for x in jax.jit(loss)(inputs))


@pytest.mark.quick
def test_heads_that_do_not_group_are_named():
    q, k, v = arrays(0, 8, 8, heads=4, groups=3)
    with pytest.raises(ValueError, match=r"k \(2, 8, 3, 6\): batch and head_dim must agree, heads be a multiple"):
        linear(q, k, v)
