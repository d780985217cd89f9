"""Orthogonal random features: orthogonal in blocks, each standard normal, unbiased, better than independent ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.numerics.features import orthogonal_gaussian

DRAWS = 4000


def draws(count, dim):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    with jax.enable_x64(True):
        return np.asarray(jax.vmap(lambda key: orthogonal_gaussian(key, count, dim, jnp.float64))(keys))


@pytest.mark.quick
def test_vectors_of_a_block_are_orthogonal():
    with jax.enable_x64(True):
        omega = np.asarray(orthogonal_gaussian(jax.random.key(0), 19, 8, jnp.float64))
    assert omega.shape == (19, 8)
    for start in (0, 8, 16):
        block = omega[start : start + 8]
        gram = block @ block.T
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)  # float64 rounding
    assert np.abs(omega[:8] @ omega[8:16].T).max() > 0.1


@pytest.mark.parametrize("count", [3, 6])
def test_every_vector_is_standard_normal(count):
    """Entry by entry, to five standard errors. Without the signs of R the first entry averages −0.8 · √dim / √dim."""
    omega = draws(count, 4)
    error = 5 / DRAWS**0.5
    np.testing.assert_allclose(omega.mean(0), 0, atol=error)
    second = np.einsum("nfi,nfj->fij", omega, omega) / DRAWS
    np.testing.assert_allclose(second, np.broadcast_to(np.eye(4), second.shape), atol=2**0.5 * error)
    np.testing.assert_allclose((omega**4).mean(0), 3, atol=96**0.5 * error)  # Var ω⁴ = 105 − 9


@pytest.mark.quick
def test_the_exponential_kernel_is_unbiased_and_varies_less_than_with_independent_vectors():
    r = np.random.default_rng(0)
    x, y = (0.3 * r.normal(size=(8,)) for _ in range(2))

    def estimates(omega):
        phi = [np.exp(omega @ z - z @ z / 2) for z in (x, y)]
        return (phi[0] * phi[1]).mean(1)

    ours, independent = estimates(draws(8, 8)), estimates(r.normal(size=(DRAWS, 8, 8)))
    assert abs(ours.mean() - np.exp(x @ y)) < 5 * ours.std() / DRAWS**0.5
    assert ours.std() < 0.97 * independent.std()  # 0.93 here
