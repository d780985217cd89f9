"""The formulas of the methods against brute force and closed forms, in float64."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from efficient_tx.compression.eora import compensation
from efficient_tx.compression.flap import standardised
from efficient_tx.compression.interpolative import (
    Interpolative,
    Stat,
    block_order,
    interpolation,
    neuron_steps,
    pivoted,
    regression,
)
from efficient_tx.compression.low_rank import svd, tail, welore_rank, whitening
from efficient_tx.compression.method import ratio
from efficient_tx.compression.statistics import tall_qr

rng = np.random.default_rng(0)


def activations(rows=200, columns=12, rank=None, seed=0):
    draws = np.random.default_rng(seed)
    mixing = draws.normal(size=(rank or columns, columns))
    return draws.normal(size=(rows, len(mixing))) @ mixing


@pytest.mark.quick
def test_interpolation_is_exact_at_the_rank_and_the_identity_on_what_is_kept():
    z = activations(rank=7)
    r, pivots = pivoted(tall_qr([np.zeros((0, 12)), z]))
    for k in (3, 7, 9, 12):
        t, kept = interpolation(r, pivots, k), np.sort(pivots[:k])
        np.testing.assert_array_equal(t[:, kept], np.eye(k))
        if k >= 7:
            np.testing.assert_allclose(z[:, kept] @ t, z, atol=1e-10)  # float64
    # k = n is a permutation undone.
    np.testing.assert_array_equal(interpolation(r, pivots, 12), np.eye(12))


@pytest.mark.quick
def test_neurons_that_are_never_active_are_not_divided_by():
    """Their diagonal entries of R are exactly zero. The reference code inverts R₁₁ whatever is in it."""
    z = activations()
    z[:, 4:] = 0
    r, pivots = pivoted(tall_qr([np.zeros((0, 12)), z]))
    for k in (4, 6, 12):
        t = interpolation(r, pivots, k)
        np.testing.assert_allclose(z[:, np.sort(pivots[:k])] @ t, z, atol=1e-10)
    np.testing.assert_array_equal(interpolation(np.zeros((12, 12)), np.arange(12), 3)[:, 3:], 0)


@pytest.mark.quick
def test_interpolation_is_the_least_squares_fit_and_its_error_is_what_is_left_of_r():
    z = activations()
    r, pivots = pivoted(tall_qr([np.zeros((0, 12)), z]))
    for k in (1, 5, 11):
        kept = np.sort(pivots[:k])
        t = interpolation(r, pivots, k)
        best = np.linalg.lstsq(z[:, kept], z, rcond=None)[0]
        np.testing.assert_allclose(t, best, atol=1e-10)
        assert np.linalg.norm(z - z[:, kept] @ t) == pytest.approx(np.linalg.norm(r[k:, k:]))


@pytest.mark.quick
def test_rows_in_blocks_have_the_same_pivots_as_all_of_them():
    z = activations(rows=301)
    r = np.zeros((0, 12))
    for start in range(0, 301, 40):
        r = tall_qr([r, z[start : start + 40]])
    np.testing.assert_allclose(r.T @ r, z.T @ z, rtol=1e-10)
    np.testing.assert_array_equal(pivoted(r)[1], scipy.linalg.qr(z, mode="r", pivoting=True)[1])


@pytest.mark.quick
def test_a_copied_neuron_goes_for_free():
    z = activations()
    z = np.concatenate([z, z[:, :1] * 0.5], axis=1)
    r, pivots = pivoted(tall_qr([np.zeros((0, 13)), z]))
    sizes = neuron_steps(13)
    losses = Interpolative().losses(r, sizes)
    assert sizes[0] == 12 and losses[0] < 1e-10
    t = interpolation(r, pivots, 12)
    np.testing.assert_allclose(z[:, np.sort(pivots[:12])] @ t, z, atol=1e-10)


@pytest.mark.quick
def test_heads_are_taken_by_their_residual_and_the_others_written_as_theirs():
    """Against projections of the activations themselves."""
    z = activations(columns=12)
    z[:, 4:8] = z[:, :4] @ rng.normal(size=(4, 4))  # the second of three heads is a combination of the first
    order, residuals = block_order(z.T @ z, 4)
    norms = [np.linalg.norm(z[:, head * 4 : head * 4 + 4]) for head in range(3)]
    assert order[0] == np.argmax(norms)
    taken = np.zeros((len(z), 0))
    for i, head in enumerate(order):
        left = z - taken @ np.linalg.lstsq(taken, z, rcond=None)[0] if i else z
        assert residuals[i] == pytest.approx(np.sum(left**2), rel=1e-8, abs=1e-8)
        taken = np.concatenate([taken, z[:, head * 4 : head * 4 + 4]], axis=1)
    assert residuals[2] < 1e-8 * residuals[0]  # two heads are enough
    kept = np.arange(4)
    t = regression(z.T @ z, kept)
    np.testing.assert_allclose(t, np.linalg.lstsq(z[:, kept], z, rcond=None)[0], atol=1e-8)


def whitened_error(x, matrix):
    return np.sum((x @ matrix) ** 2) / len(x)


@pytest.mark.quick
def test_compensation_is_the_best_of_its_rank_on_the_inputs():
    x, error = activations(columns=6), rng.normal(size=(6, 5))
    moment = x.T @ x / len(x)
    for rank in range(6):
        down, up, missed = compensation(error, moment, rank)
        assert whitened_error(x, error - down @ up) == pytest.approx(missed, rel=1e-9, abs=1e-9)
        # Eckart and Young on X ΔW itself.
        spectrum = np.linalg.svd(x @ error, compute_uv=False)
        assert missed == pytest.approx(np.sum(spectrum[rank:] ** 2) / len(x), rel=1e-9, abs=1e-9)
        u, s, v = np.linalg.svd(error)
        plain = (u[:, :5] * s)[:, :rank] @ v[:rank]
        assert missed <= whitened_error(x, error - plain) * (1 + 1e-9) + 1e-9


@pytest.mark.quick
def test_compensation_with_white_inputs_is_a_truncated_svd_and_scale_does_not_matter():
    error = rng.normal(size=(6, 5))
    u, s, v = np.linalg.svd(error, full_matrices=False)
    for scale in (1.0, 1e-6, 1e6):
        down, up, _ = compensation(error, scale * np.eye(6), 2)
        np.testing.assert_allclose(down @ up, (u[:, :2] * s[:2]) @ v[:2], atol=1e-10)


@pytest.mark.quick
def test_directions_without_inputs_are_ignored_and_not_inverted():
    """The reference code lifts negative eigenvalues only, so an input that is always zero divides by zero there."""
    x, error = activations(columns=6), rng.normal(size=(6, 5))
    x[:, 2] = 0
    # Of the second one the eigenvalue is exactly zero, without rounding.
    for moment in (x.T @ x / len(x), np.diag([3.0, 2.0, 0.0, 1.0, 5.0, 4.0])):
        down, up, missed = compensation(error, moment, 5)
        assert np.isfinite(down).all() and np.isfinite(up).all() and missed < 1e-9
        np.testing.assert_allclose(down[2], 0, atol=1e-12)
    factor, inverse = whitening(x.T @ x)
    np.testing.assert_allclose(factor @ factor.T, x.T @ x, atol=1e-9)
    np.testing.assert_allclose((factor @ inverse)[np.ix_([0, 1, 3, 4, 5], [0, 1, 3, 4, 5])], np.eye(5), atol=1e-9)


@pytest.mark.quick
def test_the_tail_is_the_error_of_truncation():
    matrix = rng.normal(size=(9, 6))
    u, s, v = svd(matrix)
    for rank in range(7):
        near = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert tail(s, rank) == pytest.approx(np.linalg.norm(matrix - near) / np.linalg.norm(matrix), abs=1e-12)


@pytest.mark.quick
def test_an_error_that_is_no_number_is_not_zero():
    assert ratio(0.0, 0.0) == ratio(-1e-20, 1.0) == 0 and ratio(1.0, 4.0) == 0.5
    assert np.isnan([ratio(np.nan, 1.0), ratio(1.0, np.nan), ratio(np.nan, np.nan)]).all()


@pytest.mark.quick
def test_welore_ranks():
    singular = np.array([9.0, 5.0, 4.0, 2.0, 1.0])
    assert [welore_rank(singular, threshold) for threshold in (0, 0.1, 0.125, 0.5, 0.51, 1)] == [5, 4, 4, 2, 1, 1]
    for scale in (1e-3, 1e3):
        ranks = [welore_rank(scale * singular, threshold) for threshold in np.linspace(0, 1, 30)]
        assert ranks == [welore_rank(singular, threshold) for threshold in np.linspace(0, 1, 30)]
        assert ranks == sorted(ranks, reverse=True)
    assert welore_rank(np.ones(4), 0.7) == 4  # all alike: none is small


@pytest.mark.quick
def test_scores_that_are_all_alike_are_standardised_to_zeros():
    np.testing.assert_array_equal(standardised(np.full(5, 3.0)), 0)
    out = standardised(rng.normal(size=50) * 7 + 3)
    assert out.mean() == pytest.approx(0, abs=1e-12) and out.std() == pytest.approx(1)


@pytest.mark.quick
def test_block_order_against_all_choices():
    """Greedy: no second head leaves less than the one that is taken, for equal heads of one channel."""
    z = activations(columns=5)
    order, residuals = block_order(z.T @ z, 1)
    first = order[0]
    norms = {
        other: np.linalg.norm(z[:, other] - z[:, [first]] @ np.linalg.lstsq(z[:, [first]], z[:, other], rcond=None)[0])
        for other in range(5)
        if other != first
    }
    assert order[1] == max(norms, key=norms.get)
    assert all(a >= b for a, b in itertools.pairwise(residuals))


@pytest.mark.quick
def test_neurons_and_heads_of_one_channel_cost_the_same():
    """So that STAT orders both by one measure, what a step adds to ‖Z − Z_J T‖² / ‖Z‖²."""
    z = activations(columns=12)
    r, pivots = pivoted(tall_qr([np.zeros((0, 12)), z]))
    order, residuals = block_order(z.T @ z, 1)
    np.testing.assert_array_equal(order, pivots)
    sizes = range(11, 0, -1)
    losses = np.array(Stat().losses(r, sizes))
    np.testing.assert_allclose(losses, -np.diff(residuals / residuals[0], append=0)[:0:-1], atol=1e-12)
    for k in (1, 5, 11):
        left = z - z[:, pivots[:k]] @ np.linalg.lstsq(z[:, pivots[:k]], z, rcond=None)[0]
        assert losses[: 12 - k].sum() == pytest.approx(np.sum(left**2) / np.sum(z**2))
    # The decomposition of neurons alone is ordered as published, by one residual.
    assert Interpolative().losses(r, [0, 5]) == pytest.approx([1, abs(r[5, 5] / r[0, 0])])
