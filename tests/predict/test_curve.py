"""Extrapolated losses, beside laws of which they are."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from efficient_tx.predict.curve import EXPONENTS, SHAPES, extrapolate

pytestmark = pytest.mark.quick


def law(t, floor, scale, knee, exponent):
    return floor + scale * (1 + t / knee) ** -exponent


def test_a_law_of_the_grid_goes_on_as_it_is():
    """Without noise nothing else is left of the grid; that late losses are averaged bends it by a millionth."""
    seen, steps = np.arange(1.0, 301), 3000
    knees, exponents = np.geomspace(1, steps, SHAPES), np.geomspace(*EXPONENTS, SHAPES)
    for knee, exponent in ((20, 70), (50, 50), (5, 80)):
        truth = (0, 2.3, knees[knee], exponents[exponent])
        assert extrapolate(law(seen, *truth), steps) == pytest.approx([law(steps, *truth)] * 3, rel=1e-4)


def test_of_many_losses_it_is_the_least_squares_fit():
    """So many losses leave the prior little say: scipy's fit is within the interval, and near its middle."""
    seen, steps, truth = np.arange(1.0, 1001), 2000, (0.4, 1.8, 30.0, 0.6)
    losses = law(seen, *truth) + 0.1 * np.random.default_rng(0).standard_normal(len(seen))
    fitted, _ = curve_fit(law, seen, losses, p0=truth, bounds=(0, np.inf))
    found = extrapolate(losses, steps)
    assert found.low < law(steps, *fitted) < found.high
    assert abs(found.median - law(steps, *fitted)) < (found.high - found.low) / 3


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 40 laws drawn as they are before, 36 are expected in intervals of 90 %; less than 29 in 1 of 1,000 tests."""
    draw, inside, count = np.random.default_rng(1), 0, 100
    for _ in range(40):
        exponent, knee = np.exp(draw.uniform(np.log(0.05), np.log(3))), np.exp(draw.uniform(0, np.log(2000)))
        first, last = law(np.array([1.0, count]), 0, 1, knee, exponent)
        # The loss begins at 2.3, and its floor is anywhere from 0 to where the seen part ends.
        share = draw.uniform()
        floor = 2.3 * share * last / (share * last + (1 - share) * first)
        truth = (floor, (2.3 - floor) / first, knee, exponent)
        found = extrapolate(law(np.arange(1.0, count + 1), *truth) + 0.05 * draw.standard_normal(count), 2000)
        inside += found.low <= law(2000, *truth) <= found.high
    assert inside >= 29


def test_few_losses_say_little_and_equal_ones_go_on():
    one, many = extrapolate([2.0], 100), extrapolate(2 - 0.01 * np.arange(80), 100)
    assert one.high - one.low > many.high - many.low
    assert one.low >= 0 and np.isfinite(one).all()
    flat = extrapolate([1.5] * 50, 1000)
    assert flat == pytest.approx((1.5, 1.5, 1.5), abs=1e-6)
    # More than are kept apart are averaged, without bending the curve.
    seen = np.arange(1.0, 5001)
    assert extrapolate(law(seen, 0.5, 2, 20, 0.7), 5000).median == pytest.approx(law(5000, 0.5, 2, 20, 0.7), rel=0.01)
