"""Means, intervals and paired differences, against closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from efficient_tx.report.content import between
from efficient_tx.report.statistics import holm, spread
from efficient_tx.report.statistics import paired as paired_with

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


def paired(one, other, **options):
    (found,) = paired_with([one], other, **options)
    return found


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
    apart = one - other
    z = apart.mean() / (apart.std() / 144**0.5)
    # The spread of 10,000 resamples is known to 0.7 %.
    assert found.p == pytest.approx(2 * stats.norm.sf(z), rel=0.1)
    assert paired(answers(one), answers(one)).p == 1.0
    assert 0 < paired(answers(np.ones(50)), answers(np.zeros(50))).p < 0.001


def test_where_items_agree_it_is_welchs_test_of_the_seeds():
    one, other = [0.61, 0.64, 0.58], [0.52, 0.55, 0.60, 0.51]
    found = paired(answers(*([x] * 40 for x in one)), answers(*([x] * 40 for x in other)), resamples=100)
    welch = stats.ttest_ind(one, other, equal_var=False)
    low, high = welch.confidence_interval(0.95)
    assert found == pytest.approx((np.mean(one) - np.mean(other), low, high, welch.pvalue), rel=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_few_seeds_hold_as_often_as_they_say(seeds):
    """No difference, items and seeds of one size: of 300 intervals of 95 % at least 90 % hold 0."""
    generator, held, claimed = np.random.default_rng(seeds), 0, 0
    for _ in range(300):
        items = generator.normal(0, 0.2, 60)
        runs = [[items + generator.normal(0, 0.05) + generator.normal(0, 0.2, 60) for _ in range(seeds)] for _ in "ab"]
        found = paired(answers(*runs[0]), answers(*runs[1]), resamples=60)
        held += found.low <= 0 <= found.high
        claimed += found.p <= 0.05
    assert held >= 270 and claimed <= 30


def test_of_one_seed_only_the_items_vary():
    good, bad = np.ones(1000), np.r_[np.ones(500), np.zeros(500)]
    one = paired(answers(good), answers(bad), resamples=1000)
    assert one.mean == 0.5 and one.high - one.low == pytest.approx(2 * 1.96 * 0.5 / 1000**0.5, rel=0.1)
    # Two seeds that differ as much leave everything open.
    two = paired(answers(good, bad), answers(bad), resamples=1000)
    assert two.mean == pytest.approx(0.25) and two.low < -1 and two.high > 1


def test_items_with_divisors_are_weighed():
    """A run's score is the sum of sums over the sum of divisors: items of many labels count more."""
    found = paired([(np.array([1.0, 30.0]), np.array([1.0, 99.0]))], [(np.array([0.0, 0.0]), np.array([1.0, 99.0]))])
    assert found.mean == pytest.approx(0.31)


def test_several_methods_have_the_differences_that_each_has_alone():
    generator = np.random.default_rng(0)
    runs = [answers(*(generator.random((seeds, 80)) < 0.5)) for seeds in (1, 2, 3)]
    assert paired_with(runs[:2], runs[2], resamples=600) == [paired(one, runs[2], resamples=600) for one in runs[:2]]


def test_holms_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_intervals_of_accuracies_end_where_accuracies_do():
    accuracy, loss = (SimpleNamespace(metric=metric) for metric in ("accuracy", "loss"))
    assert between(accuracy, -1.6655, 0.394, least=-1.0) == "−100.00 to 39.40"
    assert between(accuracy, -0.2, 1.3, least=0.0) == "0.00 to 100.00"
    assert between(loss, -1.5, 2.5, least=-1.0) == "−1.5000 to 2.5000"
