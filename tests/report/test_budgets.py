"""What methods reach after equal amounts, on curves whose answer is seen."""

from pathlib import Path

import numpy as np
import pytest

from efficient_tx.report.budgets import at_equal, seconds_at
from efficient_tx.report.flops import From
from efficient_tx.report.runs import Method, Role, Run

pytestmark = pytest.mark.quick


def run(points, seconds_per_step=0.1, finished=True):
    lines, before = [], 0
    for step, accuracy in points:
        lines.append({"step": step, "split": "train", "seconds": (step - before) * seconds_per_step, "accuracy": 0.0})
        lines.append({"step": step, "split": "validation", "accuracy": accuracy})
        before = step
    return Run(Path("run"), {"batch_size": 8}, lines, {} if finished else None, Role())


FAST = Method("fast", [run([(10, 0.1), (100, 1.0)]), run([(10, 0.2), (100, 0.2)])], 0)
SLOW = Method("slow", [run([(20, 0.2), (40, 0.4)], 1.0)], 0)
NONE = Method("none", [run([])], 0)


def test_equal_steps():
    marks, found = at_equal([FAST, SLOW, NONE], "steps", "accuracy", {})
    assert marks == [10, 20, 40] and found.keys() == {"fast", "slow"}
    assert found["fast"] == [pytest.approx([0.1, 0.2]), pytest.approx([0.2, 0.2]), pytest.approx([0.4, 0.2])]
    assert found["slow"] == [[], [pytest.approx(0.2)], [pytest.approx(0.4)]]  # nothing is known before an evaluation


def test_equal_time():
    """100 fast steps take as long as 10 slow ones, which is before the first evaluation there."""
    marks, found = at_equal([FAST, SLOW], "seconds", "accuracy", {})
    assert marks == pytest.approx([2.5, 5.0, 10.0])
    assert found["fast"][1] == pytest.approx([0.5, 0.2]) and found["slow"] == [[], [], []]


def test_a_resumed_run_has_the_time_of_all_its_steps():
    """The second line has timed half of its steps."""
    rate = {"split": "train", "examples_per_second": 16.0}
    lines = [{"step": 10, "seconds": 5.0, **rate}, {"step": 30, "seconds": 5.0, **rate}]
    resumed = Run(Path("run"), {"batch_size": 8}, lines, None, Role())
    assert seconds_at(resumed, np.array([5.0, 30.0])).tolist() == [2.5, 15.0]


def test_equal_operations():
    marks, found = at_equal([FAST, SLOW], "flops", "accuracy", {"fast": [From(0, 2.0)], "slow": [From(0, 4.0)]})
    assert marks == [40, 80, 160]
    assert found["fast"][2] == pytest.approx([0.8, 0.2]) and found["slow"][1] == pytest.approx([0.2])
    assert at_equal([FAST, SLOW], "flops", "accuracy", {"fast": [From(0, 2.0)], "slow": None})[1].keys() == {"fast"}
    assert at_equal([NONE], "steps", "accuracy", {}) == ([], {})


def test_all_finished_runs_are_in_the_table_and_a_run_that_has_just_begun_does_not_shorten_it():
    slower = Method("slower", [run([(10, 0.1), (40, 0.1)], 0.2), run([(10, 0.1), (40, 0.1)], 0.1)], 0)
    marks, found = at_equal([slower], "seconds", "accuracy", {})
    assert marks[-1] == pytest.approx(4.0) and len(found["slower"][-1]) == 2
    going = Method("going", [run([(10, 0.1)], finished=False), run([(10, 0.1), (40, 0.1)], finished=False)], 0)
    marks, found = at_equal([going], "steps", "accuracy", {})
    assert marks == [10, 20, 40] and [len(scores) for scores in found["going"]] == [2, 1, 1]
