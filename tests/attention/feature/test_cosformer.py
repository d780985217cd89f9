"""cosFormer against its dense formula, and its positions."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.attention.feature.cosformer import cosformer as uncompiled
from tests.support.samples import attention_inputs, check_equal

cosformer = jax.jit(uncompiled, static_argnames=("max_len", "causal"))
arrays = partial(attention_inputs, heads=4, dim=6, v_dim=3)
M = 160


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of at most 64 tokens, so that short sequences have several, the last one ragged."""
    monkeypatch.setattr(sys.modules["efficient_tx.attention.feature.linear"], "PIECE", 1)


def dense(q, k, v, mask, causal):
    """All weights at once, the cosine of each pair's distance in real tokens; in JAX for its gradients."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    rank = np.cumsum(mask, axis=1)
    near = np.cos(np.pi / 2 * (rank[:, :, None] - rank[:, None, :]) / M)[:, None]
    weights = jnp.einsum("bihf,bjhf->bhij", jnp.maximum(q, 0), jnp.maximum(k, 0)) * near
    weights = jnp.where(mask[:, None, None, :] & (np.tri(q.shape[1], dtype=bool) if causal else True), weights, 0)
    return jnp.einsum("bhij,bjhv->bihv", weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6), v)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.first(1)
def test_equals_the_dense_formula_and_its_gradients(causal):
    """Three pieces, padding anywhere, grouped heads, values of another width; in float64."""
    mask = np.random.default_rng(1).random((2, 150)) < 0.7
    check_equal(
        lambda *arrays: uncompiled(*arrays, max_len=M, mask=mask, causal=causal),
        lambda *arrays: dense(*arrays, mask, causal),
        arrays(0, 150, 150),
        mask,
        gradient_atol=1e-10,  # some sums of weights are small
    )


def test_the_last_query_stands_at_the_last_real_key():
    """Decoding: a cache of 70 places of which some are real, in any pattern. Its rows are those of the whole."""
    q, k, v = arrays(0, 70, 70)
    mask = np.random.default_rng(1).random((2, 70)) < 0.5
    real = np.stack([np.flatnonzero(row)[-5:] for row in mask])
    rows = np.arange(2)[:, None]
    with jax.enable_x64(True):
        whole = np.asarray(cosformer(q, k, v, max_len=M, mask=mask, causal=True))
        ours = cosformer(q[rows, real], k, v, max_len=M, mask=mask, causal=True)
    np.testing.assert_allclose(ours, whole[rows, real], atol=1e-12)


@pytest.mark.quick
def test_queries_without_keys_give_zero():
    q, k, v = (x.astype(np.float32) for x in arrays(0, 20, 20))
    for causal in (False, True):
        out = cosformer(q, k, v, max_len=M, mask=np.zeros((2, 20), bool), causal=causal)
        assert (np.asarray(out) == 0).all()


@pytest.mark.quick
def test_what_has_no_positions_is_refused():
    q, k, v = arrays(0, 20, 20)
    with pytest.raises(ValueError, match="5 queries and 20 keys: it needs positions, so use causal=True"):
        uncompiled(q[:, :5], k, v, max_len=M)
    with pytest.raises(ValueError, match="length is 20, but cosformer was built for max_len=19"):
        uncompiled(q, k, v, max_len=19)
