"""Tuning chooses by validation, from all runs or not at all."""

from types import SimpleNamespace

import pytest

from efficient_tx.sweep.plan import Cell, Method
from efficient_tx.sweep.tuning import choose

pytestmark = pytest.mark.quick

POINTS = [{"rate": "1"}, {"rate": "2"}, {"rate": "3"}]
CELL = Cell(Method("softmax", "dense"), {}, POINTS)
RUNS = [
    SimpleNamespace(cell=CELL, settings=point, name=f"{point['rate']}-{seed}") for point in POINTS for seed in range(2)
]
OTHER = SimpleNamespace(cell=Cell(Method("vmean", "dense"), {}, POINTS), settings=POINTS[0], name="other")


def results(*scores, metric="accuracy", **more):
    return {run.name: None if score is None else {f"val_{metric}": score, **more} for run, score in zip(RUNS, scores)}


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (results(0.1, 0.3, 0.9, 0.2, 0.2, 0.3), (POINTS[1], 0.55)),
        (results(0.5, 0.5, 0.4, 0.6, 0.1, 0.1), (POINTS[0], 0.5)),  # the first of equals
        (results(0.1, 0.3, 0.9, None, 0.2, 0.3), (POINTS[2], 0.25)),  # a seed of the best one diverged
        (results(4, 4, 2, 2, 3, 3, metric="loss"), (POINTS[1], 2)),
        (results(4, 4, 2, 2, 3, 3, metric="error", higher_is_better=False), (POINTS[1], 2)),
        (results(4, 4, 2, 2, 3, 3, metric="error", higher_is_better=True), (POINTS[0], 4)),
        (results(*[None] * 6), None),
        (results(0.1, 0.3, 0.9, 0.2, 0.2), None),  # one has not ended
    ],
)
def test_the_best_mean_on_validation_is_chosen(given, chosen):
    assert choose(CELL, [*RUNS, OTHER], given) == (chosen and (chosen[0], pytest.approx(chosen[1])))
