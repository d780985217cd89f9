"""A low-rank matrix divided by another one: the quotient itself, its start, and denominators that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_tx.linear import HadamardQuotient, LowRank
from efficient_tx.linear.hadamard_quotient import LEAST

N, M = 13, 7


def layer(**options):
    return HadamardQuotient(N, M, use_bias=False, rngs=nnx.Rngs(0), **options)


@pytest.mark.quick
def test_the_weight_is_the_quotient_and_may_have_a_higher_rank():
    made, rng = layer(rank=2, terms=3), np.random.default_rng(0)
    made.left[...], made.right[...] = rng.uniform(0.5, 2, (3, N)), rng.uniform(0.5, 2, (3, M))
    left, right, down, up = (np.asarray(getattr(made, name)[...], float) for name in made.factors())
    weight = (down.T @ up) / (left.T @ right)
    np.testing.assert_allclose(made.to_dense(), weight, rtol=1e-5, atol=1e-6)  # float32
    assert np.linalg.matrix_rank(weight) == M
    assert made.bytes_stored == 4 * (2 + 3) * (N + M)


@pytest.mark.quick
def test_denominators_that_are_none_are_lifted():
    made = layer(rank=2)
    made.left[...] = made.left[...].at[0, :4].set([0, -1, LEAST / 2, 2 * LEAST])
    expected = (made.down[...].T @ made.up[...])[:4] / np.array([LEAST, LEAST, LEAST, 2 * LEAST])[:, None]
    np.testing.assert_allclose(made.to_dense()[:4], expected, rtol=1e-5)
    grads = jax.grad(lambda layer: jnp.sum(layer(jnp.ones((2, N))) ** 2))(made)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(nnx.state(grads)))


@pytest.mark.quick
@pytest.mark.parametrize("projected", [False, True])
def test_all_terms_learn_from_the_start(projected):
    """Terms that are alike, or zero in both factors, would stay so."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(N, M)), jnp.float32)
    made = HadamardQuotient.from_dense(kernel, rank=2, terms=3) if projected else layer(rank=2, terms=3)
    np.testing.assert_array_equal(made.left[...].T @ made.right[...], 1)
    for _ in range(2):
        grads = jax.grad(lambda layer: jnp.sum((layer.to_dense() - kernel) ** 2))(made)
        nnx.update(made, jax.tree.map(lambda p, g: p - 1e-3 * g, nnx.state(made), nnx.state(grads)))
    assert np.linalg.matrix_rank(grads.left[...]) == np.linalg.matrix_rank(grads.right[...]) == 3


@pytest.mark.quick
def test_the_projection_is_that_of_a_low_rank_layer():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(N, M)), jnp.float32)
    np.testing.assert_allclose(
        HadamardQuotient.from_dense(kernel, rank=3).to_dense(), LowRank.from_dense(kernel, rank=3).to_dense(), atol=1e-6
    )
