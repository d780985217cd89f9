"""What is learnt of finished runs, beside regressions and ranks computed another way."""

import numpy as np
import pytest
from scipy import stats

from efficient_tx.predict.measures import MEASURES
from efficient_tx.predict.ranking import Known, features, fitted, learn, places, scored, spearman, standardised

pytestmark = pytest.mark.quick
NAMES = [*MEASURES]


def task(name, final, seed, **given):
    """Methods with these final scores and measures, and others that are noise."""
    draw = np.random.default_rng(seed)
    columns = {name: draw.standard_normal(len(final)) for name in NAMES} | given
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return Known(name, [f"m{i}" for i in range(len(final))], rows, list(final))


def test_measures_are_compared_within_a_task():
    assert standardised([1, 2, 3, None]) == pytest.approx([-(1.5**0.5), 0, 1.5**0.5, 0])
    assert (standardised([4, 4, 4]) == 0).all() and (standardised([None, None]) == 0).all()
    one = task("a", [1, 2, 3], 0, validation_loss=np.array([3.0, 2.0, 1.0]))
    # A low loss counts as a high score does.
    assert features(one.measures)[:, NAMES.index("validation_loss")] == pytest.approx(standardised([1, 2, 3]))


def test_weights_are_those_of_a_ridge_regression():
    tasks = [task(str(i), np.random.default_rng(9 + i).random(7), i) for i in range(3)]
    x = np.concatenate([features(t.measures) for t in tasks])
    y = np.concatenate([stats.zscore(t.final) for t in tasks])
    augmented = np.concatenate([x, np.sqrt(len(x)) * np.eye(len(NAMES))])
    pulled = np.full(len(NAMES), np.sqrt(len(x)) / len(NAMES))  # towards equal weights
    expected = np.linalg.lstsq(augmented, np.concatenate([y, pulled]), rcond=None)[0]
    assert fitted(tasks) == pytest.approx(expected, abs=1e-10)
    assert fitted([]) == pytest.approx(1 / len(NAMES))


def test_what_tells_the_order_elsewhere_is_trusted_and_noise_is_not():
    finals = [np.random.default_rng(i).random(12) for i in range(3)]
    telling = [task(str(i), final, i, mean_loss=-final) for i, final in enumerate(finals)]
    noise = [task(str(i), final, i) for i, final in enumerate(finals)]
    assert fitted(telling).argmax() == NAMES.index("mean_loss")
    assert learn(telling).spread < 0.8 < learn(noise).spread
    assert learn(telling[:1]).spread == 1  # nobody has seen what it misses
    assert np.mean(scored(telling)["all"]) > 0.8 > np.mean(scored(noise)["all"])
    assert scored(telling)["mean_loss"] == pytest.approx([1, 1, 1])


def test_a_task_is_scored_without_having_been_learnt_from():
    """Two tasks whose measure tells the order the wrong way round: what one teaches is wrong of the other."""
    final = np.arange(8.0)
    same = {name: np.zeros(8) for name in NAMES}
    tasks = [task("a", final, 0, **same | {"seen": final}), task("b", final, 1, **same | {"seen": -final})]
    assert scored(tasks)["all"] == pytest.approx([-1, -1])


def test_ranks_have_the_interval_of_what_is_missed():
    final = np.arange(6.0)
    same = {name: np.zeros(6) for name in NAMES}
    tasks = [task(str(i), final, i, **same | {"seen": final}) for i in range(3)]
    sure = places(learn(tasks)._replace(spread=1e-9), tasks[0].measures)
    assert [place.rank for place in sure] == [6, 5, 4, 3, 2, 1]
    assert [(place.low, place.high) for place in sure] == [(r, r) for r in (6, 5, 4, 3, 2, 1)]
    unsure = places(learn(tasks)._replace(spread=1e9), tasks[0].measures)
    # Of six places all alike, 5 % of draws lie in the first and in the last.
    assert {(place.low, place.high) for place in unsure} == {(1, 6)}
    assert [place.rank for place in unsure] == pytest.approx(
        [3.5] * 6, abs=0.1
    )  # of 4,000 draws: 4 deviations of 0.027
    broken = [{**tasks[0].measures[5], "fault": "not finite"}, *tasks[0].measures[:5]]
    assert places(learn(tasks), broken)[0] == (6, 6, 6)


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)  # 1 - 6 * 2 / (4 * 15)
    assert spearman([1, 1, 1], [1, 2, 3]) is None
