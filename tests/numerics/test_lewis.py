"""ℓp Lewis weights against their fixed point, computed in NumPy, and what they bound."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from efficient_tx.numerics.leverage import leverage_scores
from efficient_tx.numerics.lewis import lewis_weights as uncompiled

lewis_weights = jax.jit(uncompiled, static_argnames=("p", "iterations"))

POWERS = (1.0, 3.0, 8.0)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def leverage(a):
    """Of matrices of full rank."""
    return np.square(np.linalg.qr(a)[0]).sum(-1)


KINDS = {
    "random": lambda: normal(0, 80, 5),
    "clustered": lambda: np.concatenate([normal(1, 1, 5) + 0.05 * normal(0, 74, 5), 5 * normal(2, 6, 5)]),
    "graded": lambda: normal(0, 80, 5) * np.geomspace(1e-4, 1, 80)[:, None],
    "heavy tails": lambda: np.random.default_rng(0).standard_cauchy(size=(80, 5)),
}


@pytest.mark.parametrize("p", POWERS)
def test_the_fixed_point_holds_on_both_sides_and_sums_to_the_rank(p):
    a = np.stack([make() for make in KINDS.values()])
    with jax.enable_x64(True):
        w = np.asarray(lewis_weights(a, p, iterations=120))
        rough = np.asarray(lewis_weights(a, p))
    # 120 steps leave 0.6^120 of the error; below 1e-20 there is only the rounding of the decompositions.
    np.testing.assert_allclose(leverage(a * w[..., None] ** (0.5 - 1 / p)), w, rtol=1e-7, atol=1e-20)
    np.testing.assert_allclose(w.sum(1), 5, atol=1e-7)
    np.testing.assert_allclose(rough, w, rtol=3e-3)  # what the default number of steps promises, thrice


@pytest.mark.parametrize("p", [1.0, 8.0])
def test_float32_is_enough_to_select(p):
    a = np.stack([make() for make in KINDS.values()])
    single = np.asarray(lewis_weights(a.astype(np.float32), p))
    with jax.enable_x64(True):
        double = np.asarray(lewis_weights(a, p))
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, double, rtol=1e-2, atol=1e-5)


def test_at_two_the_weights_are_the_leverage_scores():
    a = np.stack([make() for make in KINDS.values()])
    with jax.enable_x64(True):
        np.testing.assert_allclose(lewis_weights(a, 2.0), leverage_scores(a), atol=1e-12)


@pytest.mark.quick
def test_scale_and_basis_change_nothing():
    a, basis = KINDS["random"](), normal(3, 5, 5)
    with jax.enable_x64(True):
        w = np.asarray(lewis_weights(a, 4.0))
        np.testing.assert_allclose(lewis_weights(1e3 * a, 4.0), w, rtol=1e-9)
        np.testing.assert_allclose(lewis_weights(a @ basis, 4.0), w, rtol=1e-7)


@pytest.mark.parametrize("p", POWERS)
def test_no_direction_gives_a_row_more_than_its_bound(p):
    """|a_iᵀx|^p / ‖Ax‖_p^p ≤ rank^max(0, p/2 − 1) w_i, tried on the rows' own directions and on random ones."""
    for make in KINDS.values():
        a = make()
        with jax.enable_x64(True):
            w = np.asarray(lewis_weights(a, p, iterations=60))
        own = np.linalg.solve(a.T @ (w[:, None] ** (1 - 2 / p) * a), a.T)
        x = np.concatenate([own, normal(4, 5, 3000)], axis=1)
        shares = np.abs(a @ x) ** p
        shares /= shares.sum(0)
        assert (shares.max(1) <= 5 ** max(0, p / 2 - 1) * w * (1 + 1e-6)).all()


@pytest.mark.quick
def test_sensitivities_at_one_are_below_the_weights():
    """s_i = 1 / min {‖Ax‖₁ : a_iᵀx = 1} by linear programming: x = x⁺ − x⁻ free, t ≥ |Ax|."""
    a = normal(0, 24, 4)
    n, d = a.shape
    with jax.enable_x64(True):
        w = np.asarray(lewis_weights(a, 1.0, iterations=60))
    above = np.block([[a, -np.eye(n)], [-a, -np.eye(n)]])
    cost = np.r_[np.zeros(d), np.ones(n)]
    bounds = [(None, None)] * d + [(0, None)] * n
    sensitivities = [
        1 / linprog(cost, above, np.zeros(2 * n), np.r_[row, np.zeros(n)][None], [1.0], bounds).fun for row in a
    ]
    assert (np.array(sensitivities) <= w + 1e-9).all()
    assert 1 < sum(sensitivities) < d


def test_masked_rows_weigh_nothing_and_a_missing_rank_stays_missing():
    a = np.stack([normal(0, 40, 3) @ normal(1, 3, 6)] * 3)
    mask = np.random.default_rng(2).random((3, 40)) < 0.7
    mask[2] = False
    hostile = np.where(mask[..., None], a, np.nan)
    with jax.enable_x64(True):
        w = np.asarray(lewis_weights(hostile, 3.0, mask=mask, iterations=40))
        by_rows = jax.grad(lambda a: lewis_weights(a, 3.0, mask=mask, iterations=40).sum())(hostile)
    assert (w[~mask] == 0).all()
    np.testing.assert_allclose(w.sum(1), [3, 3, 0], atol=1e-8)
    for row in (0, 1):
        basis, weights = np.linalg.svd(a[row][mask[row]])[0][:, :3], w[row][mask[row]]
        np.testing.assert_allclose(leverage(basis * weights[:, None] ** (0.5 - 1 / 3)), weights, rtol=1e-8)
    assert (np.asarray(by_rows) == 0).all()


@pytest.mark.quick
def test_powers_below_one_are_refused():
    with pytest.raises(ValueError, match=r"p is 0\.5: .* at least 1"):
        lewis_weights(jnp.ones((3, 2)), 0.5)
