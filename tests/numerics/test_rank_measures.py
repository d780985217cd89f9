"""Cheap measures of rank against decompositions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from efficient_tx.numerics.rank_measures import matrix_nuclear_norm, residual_errors

pytestmark = pytest.mark.quick


def states(n=40, d=12, seed=0):
    draws = np.random.default_rng(seed)
    return np.float32(draws.normal(size=(n, d)) @ draws.normal(size=(d, d)) + 3 * draws.normal(size=d))


def normalised(x):
    x = np.float64(x) - np.mean(np.float64(x), 0)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def nuclear(x):
    return np.linalg.svd(x, compute_uv=False).sum()


@pytest.mark.parametrize(("n", "d"), [(40, 12), (12, 12), (9, 30)])
def test_it_is_bounded_by_the_nuclear_norm_and_by_its_size(n, d):
    x = states(n, d)
    value = float(matrix_nuclear_norm(x))
    norms = np.sort(np.linalg.norm(normalised(x), axis=0))[::-1]
    assert value == pytest.approx(norms[: min(n, d)].sum(), rel=1e-5)
    assert value <= np.sqrt(n * min(n, d))
    assert d > n or value >= nuclear(normalised(x))


def test_orthogonal_columns_have_their_nuclear_norm_and_a_single_one_its_length():
    hadamard = scipy.linalg.hadamard(16)[:, 1:]  # of mean zero; rows of equal length
    expected = nuclear(hadamard / np.sqrt(15))
    assert float(matrix_nuclear_norm(jnp.float32(hadamard))) == pytest.approx(expected, rel=1e-5)
    ones = np.where(np.arange(16) % 2, 1.0, -1.0)[:, None]
    assert float(matrix_nuclear_norm(jnp.float32(ones))) == pytest.approx(4.0)


def test_orders_shift_and_scale_do_not_matter_but_the_basis_does():
    x, draws = states(), np.random.default_rng(1)
    value = float(matrix_nuclear_norm(x))
    for other in (x[draws.permutation(40)], x[:, draws.permutation(12)], 5 * x, x + 7):
        assert float(matrix_nuclear_norm(other)) == pytest.approx(value, rel=1e-4)
    axes = np.linalg.svd(normalised(x))[2].T
    rotated = float(matrix_nuclear_norm(np.float32(x @ axes)))
    assert rotated == pytest.approx(nuclear(normalised(x)), rel=1e-3) and rotated < 0.9 * value


def test_states_that_are_the_mean_do_not_make_it_nan():
    """The published code divides them by their length."""
    assert float(matrix_nuclear_norm(jnp.ones((5, 3)))) == 0
    x = np.array([[1.0, 2], [-1, -2], [0, 0]], np.float32)
    assert float(matrix_nuclear_norm(x)) == pytest.approx(np.linalg.norm(normalised(x[:2]), axis=0).sum(), rel=1e-5)


def spectrum_matrix(singular, n=60, m=50):
    draws = np.random.default_rng(2)
    u, v = (np.linalg.qr(draws.normal(size=(size, len(singular))))[0] for size in (n, m))
    return np.float32((u * singular) @ v.T)


def estimates(matrix, size, draws=200):
    matrix = jnp.asarray(matrix)
    keys = jax.random.split(jax.random.key(0), draws)
    return np.asarray(jax.lax.map(lambda key: residual_errors(lambda x: matrix @ x, matrix.shape, size, key=key), keys))


def test_with_a_gap_the_residual_is_right_in_the_mean_and_never_too_high_without():
    size, draws = 20, 200
    for singular, k in ((np.r_[np.full(5, 100.0), np.full(40, 1.0)], 5), (1 / np.arange(1.0, 46), 5)):
        truth = np.sum(singular[k:] ** 2)
        squares = estimates(spectrum_matrix(singular), size, draws)[:, k] ** 2
        noise = 4 * squares.std() / np.sqrt(draws)  # four standard errors of the mean
        undivided = (1 - k / size) ** 2
        assert undivided * squares.mean() <= truth + noise
        if singular[0] == 100:
            assert squares.mean() == pytest.approx(truth, abs=noise + 0.01 * truth)
        else:
            assert 0.5 * truth < squares.mean() < truth  # no gap: too low


def test_without_a_rank_it_is_the_frobenius_norm_and_at_the_rank_zero():
    matrix = spectrum_matrix(np.array([5.0, 3, 2, 1]))
    squares = estimates(matrix, 12)[:, :6] ** 2
    assert squares[:, 0].mean() == pytest.approx(39.0, abs=4 * squares[:, 0].std() / np.sqrt(200))
    # float32 of singular values up to 5.
    assert np.sqrt(squares[:, 4:]).max() < 1e-4
    assert (np.diff((1 - np.arange(6) / 12) * np.sqrt(squares), axis=1) <= 0).all()


def test_only_products_are_asked_for():
    """A sum of a diagonal and an outer product, never formed."""
    diagonal, vector = jnp.r_[jnp.full(300, 1.0)], jnp.linspace(5.0, 10.0, 300)
    asked = []

    def times(x):
        asked.append(x.shape)
        return diagonal[:, None] * x + vector[:, None] * (vector @ x)

    found = residual_errors(times, (300, 300), 60, key=jax.random.key(3))
    assert asked == [(300, 60)]
    # One residual of norm √299 beside a singular value of 17,501: one draw of 3,481 products, 2 %; three of these.
    assert float(found[1]) == pytest.approx(np.sqrt(299), rel=0.06)
