"""Means, intervals and paired differences, against closed forms."""

import numpy as np
import pytest
from scipy import stats

from efficient_tx.report.statistics import holm, paired, spread

pytestmark = pytest.mark.quick


def test_the_interval_is_students():
    scores = [0.41, 0.44, 0.38, 0.40]
    of = spread(scores)
    assert (of.count, of.mean, of.deviation) == (
        4,
        pytest.approx(np.mean(scores)),
        pytest.approx(np.std(scores, ddof=1)),
    )
    low, high = stats.t.interval(0.95, 3, loc=np.mean(scores), scale=stats.sem(scores))
    assert (of.low, of.high) == (pytest.approx(low), pytest.approx(high))


def test_one_seed_has_no_deviation():
    assert spread([0.4]) == (1, 0.4, None, None, None)


def answers(*runs):
    return [(np.asarray(run, float), np.ones(len(run))) for run in runs]


def test_the_paired_interval_is_that_of_the_differences():
    """Of one run each: the mean difference of an item, ±1.96 standard errors, as there are many items."""
    generator = np.random.default_rng(0)
    one = generator.random(1000) < 0.5
    other = np.where(generator.random(1000) < 0.9, one, ~one)  # they mostly agree: unpaired, the error is larger
    found = paired(answers(one), answers(other))
    apart = one.astype(float) - other
    error = apart.std() / len(apart) ** 0.5
    assert found.mean == pytest.approx(apart.mean())
    # Quantiles of 10,000 resamples are known to a few hundredths of a standard error.
    assert found.low == pytest.approx(apart.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(apart.mean() + 1.96 * error, abs=0.1 * error)


def test_the_probability_is_that_of_a_sign_test():
    """30 items that only the one gets right, 14 that only the other does: z = 16/√44."""
    one = np.r_[np.ones(30), np.zeros(14), np.ones(100)]
    other = np.r_[np.zeros(30), np.ones(14), np.ones(100)]
    found = paired(answers(one), answers(other))
    # The bootstrap centres on the difference found; its tails are those of the normal with the spread of the items.
    apart = one - other
    z = apart.mean() / (apart.std() / 144**0.5)
    assert found.p == pytest.approx(2 * stats.norm.sf(z), rel=0.3)
    assert paired(answers(one), answers(one)).p == 1.0
    assert 0 < paired(answers(np.ones(50)), answers(np.zeros(50))).p < 0.001


def test_seeds_widen_the_interval():
    """Two seeds that differ a lot, on items that do not: the interval spans what the seeds span."""
    good, bad = np.ones(1000), np.r_[np.ones(500), np.zeros(500)]
    found = paired(answers(good, bad), answers(bad), resamples=1000)
    assert found.mean == pytest.approx(0.25) and found.low < 0.01 and found.high > 0.49


def test_items_with_divisors_are_weighed():
    """A run's score is the sum of sums over the sum of divisors: items of many labels count more."""
    found = paired([(np.array([1.0, 30.0]), np.array([1.0, 99.0]))], [(np.array([0.0, 0.0]), np.array([1.0, 99.0]))])
    assert found.mean == pytest.approx(0.31)


def test_holms_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []
