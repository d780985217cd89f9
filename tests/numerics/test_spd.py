"""Positive definite solves and the Newton-type inverse against NumPy and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.numerics.spd import newton_inverse, newton_raphson_inverse, spd_solve


def spd(seed, size, *, smallest, batch=()):
    """Symmetric matrices with eigenvalues spread geometrically from `smallest` to 1."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(*batch, size, size)))
    return (basis * np.geomspace(smallest, 1, size)) @ basis.swapaxes(-1, -2)


def test_spd_solve_equals_numpy():
    a, b = spd(0, 12, smallest=1e-3, batch=(2, 3)), np.random.default_rng(1).normal(size=(2, 3, 12, 5))
    expected = np.linalg.solve(a, b)
    with jax.enable_x64(True):
        # Condition number 1e3 times the rounding of float64.
        np.testing.assert_allclose(spd_solve(a, b), expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    single = spd_solve(a.astype(np.float32), b.astype(np.float32))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, expected, rtol=0, atol=1e-3 * np.abs(expected).max())


def test_spd_solve_has_the_closed_form_gradient():
    """Against central differences along symmetric directions, and against differentiation through an LU solve."""
    a, r = spd(0, 6, smallest=1e-2, batch=(2,)), np.random.default_rng(1)
    b, w = r.normal(size=(2, 6, 3)), r.normal(size=(2, 6, 3))
    with jax.enable_x64(True):
        ours = jax.grad(lambda a, b: jnp.vdot(spd_solve(a, b), w), argnums=(0, 1))(a, b)
        theirs = jax.grad(lambda a, b: jnp.vdot(jnp.linalg.solve(a, b), w), argnums=(0, 1))(a, b)
        (a_bar, b_bar), (lu_a, lu_b) = (map(np.asarray, pair) for pair in (ours, theirs))
    np.testing.assert_allclose(a_bar, (lu_a + lu_a.swapaxes(-1, -2)) / 2, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(b_bar, lu_b, rtol=1e-9, atol=1e-9)

    direction = r.normal(size=a.shape)
    direction = direction + direction.swapaxes(-1, -2)
    step = 1e-6

    def loss(t):
        return np.vdot(np.linalg.solve(a + t * direction, b), w)

    slope = (loss(step) - loss(-step)) / (2 * step)
    assert np.vdot(a_bar, direction) == pytest.approx(slope, rel=1e-5)


@pytest.mark.quick
def test_nothing_is_differentiated_through_the_factorisation():
    """The backward pass solves with the factor at hand: one factorisation in all, and no other decomposition."""
    a, b = spd(0, 6, smallest=0.1).astype(np.float32), np.ones((6, 2), np.float32)
    text = str(jax.make_jaxpr(jax.grad(lambda a, b: spd_solve(a, b).sum(), argnums=(0, 1)))(a, b))
    assert text.count("cholesky") - text.count("cholesky_update") == 1
    assert text.count("custom_vmap_call[") == 5  # and two solves in each direction


@pytest.mark.slow
def test_one_newton_step_maps_the_error_as_published():
    """For a 1 × 1 matrix: E = 1 − A X becomes E³ (E + 3) / 4, here from X₀ = 1."""
    with jax.enable_x64(True):
        for a in (0.05, 0.4, 0.999, 1.0, 1.8):
            error = 1 - a
            for iterations in range(4):
                x, residual = newton_inverse(jnp.full((1, 1), a), iterations, start=jnp.ones((1, 1)))
                assert float(residual) == pytest.approx(abs(error), abs=1e-14)
                assert float(1 - a * x[0, 0]) == pytest.approx(error, abs=1e-14)
                error = error**3 * (error + 3) / 4


@pytest.mark.slow
def test_from_its_own_norms_any_matrix_converges_to_its_pseudo_inverse():
    """The four conditions of Moore and Penrose, for wide, tall and asymmetric matrices with singular values ≥ 0.1."""
    r = np.random.default_rng(0)
    with jax.enable_x64(True):
        for rows, columns in ((8, 8), (5, 12), (12, 5)):
            left, _ = np.linalg.qr(r.normal(size=(2, rows, min(rows, columns))))
            right, _ = np.linalg.qr(r.normal(size=(2, columns, min(rows, columns))))
            a = 7 * (left * np.geomspace(0.1, 1, min(rows, columns))) @ right.swapaxes(-1, -2)
            x, residual = (np.asarray(y) for y in newton_inverse(jnp.asarray(a), 14))
            for ours, expected in ((a @ x @ a, a), (x @ a @ x, x), (a @ x, (a @ x).mT), (x @ a, (x @ a).mT)):
                np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)  # the condition 10, squared, × rounding
            # Without a right inverse I − A X is a projection, which the report shows.
            assert (residual < 1e-10).all() if rows <= columns else (residual >= 1).all()
        zero, _ = newton_inverse(jnp.zeros((3, 3)))
        assert (np.asarray(zero) == 0).all()


def test_for_the_spectrum_of_a_normalised_kernel_the_identity_is_the_better_start():
    a = spd(0, 16, smallest=1e-3).astype(np.float32)
    residuals = [float(newton_inverse(a, 8, start=start)[1]) for start in (None, jnp.eye(16))]
    assert residuals[1] < 1e-3 < 0.5 < residuals[0]


@pytest.mark.slow
def test_newton_inverse_converges_and_its_report_bounds_the_error():
    a = spd(0, 24, smallest=0.05, batch=(3,))
    exact = np.linalg.inv(a)

    def row_sums(x):
        return np.abs(x).sum(-1).max(-1)

    with jax.enable_x64(True):
        for iterations in (2, 6, 12):
            x, residual = (np.asarray(y) for y in newton_inverse(jnp.asarray(a), iterations))
            np.testing.assert_allclose(residual, row_sums(np.eye(24) - a @ x), rtol=1e-6, atol=1e-13)
            # X − A⁻¹ = −A⁻¹ (I − A X), so the relative error is at most the residual.
            assert (row_sums(x - exact) <= residual * row_sums(exact) * (1 + 1e-9) + 1e-12).all()
    np.testing.assert_allclose(x, exact, atol=1e-10)


@pytest.mark.quick
def test_newton_inverse_of_a_matrix_ignores_the_others_of_the_batch():
    """The published start divides by one maximum over the batch: 100 times larger neighbours would stall it."""
    a = spd(0, 16, smallest=0.1).astype(np.float32)
    alone, _ = newton_inverse(a, 4)
    beside, _ = newton_inverse(np.stack([a, 100 * a]), 4)
    np.testing.assert_allclose(beside[0], alone, rtol=1e-5, atol=1e-5)


def test_newton_raphson_squares_the_error_from_the_published_start():
    a = spd(0, 16, smallest=0.05, batch=(2,)) * np.array([1.0, 30.0])[:, None, None]
    scale = 1.8 / np.abs(a).sum(-1).max(-1)[:, None, None] ** 2
    start = np.eye(16) - a @ (scale * a)
    with jax.enable_x64(True):
        for iterations in (0, 3, 6):
            x, residual = (np.asarray(y) for y in newton_raphson_inverse(jnp.asarray(a), iterations))
            error = np.linalg.matrix_power(start, 2**iterations)
            np.testing.assert_allclose(np.eye(16) - a @ x, error, atol=1e-12)  # float64 rounding
            np.testing.assert_allclose(residual, np.abs(error).sum(-1).max(-1), rtol=1e-9)
        x, residual = newton_raphson_inverse(jnp.asarray(a), 20)
        np.testing.assert_allclose(x, np.linalg.inv(a), rtol=0, atol=1e-12 * 20 / 0.05)
        assert (np.asarray(residual) < 1e-11).all()


@pytest.mark.slow
def test_newton_raphson_has_the_gradient_of_the_inverse():
    """−A⁻¹ X̄ A⁻¹, symmetrised, at any number of iterations that converge; the residual carries none."""
    a, w = spd(0, 6, smallest=0.1), np.random.default_rng(1).normal(size=(6, 6))
    inverse = np.linalg.inv(a)
    expected = -inverse @ w @ inverse
    with jax.enable_x64(True):
        grad = jax.grad(lambda a: jnp.vdot(newton_raphson_inverse(a, 20)[0], w) + newton_raphson_inverse(a, 2)[1])(a)
        np.testing.assert_allclose(grad, (expected + expected.T) / 2, rtol=1e-9, atol=1e-9)
