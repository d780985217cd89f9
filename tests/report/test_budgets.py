"""What methods reach after equal amounts, on curves whose answer is seen."""

from types import SimpleNamespace

import pytest

from efficient_tx.report.budgets import at_equal

pytestmark = pytest.mark.quick


def run(points, seconds_per_step):
    lines, before = [], 0
    for step, accuracy in points:
        lines.append({"step": step, "split": "train", "seconds": (step - before) * seconds_per_step, "accuracy": 0.0})
        lines.append({"step": step, "split": "validation", "accuracy": accuracy})
        before = step
    return SimpleNamespace(lines=lines)


FAST = SimpleNamespace(label="fast", runs=[run([(10, 0.1), (100, 1.0)], 0.1), run([(10, 0.2), (100, 0.2)], 0.1)])
SLOW = SimpleNamespace(label="slow", runs=[run([(20, 0.2), (40, 0.4)], 1.0)])
NONE = SimpleNamespace(label="none", runs=[SimpleNamespace(lines=[])])


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


def test_equal_operations():
    marks, found = at_equal([FAST, SLOW], "flops", "accuracy", {"fast": 2.0, "slow": 4.0})
    assert marks == [40, 80, 160]
    assert found["fast"][2] == pytest.approx([0.8, 0.2]) and found["slow"][1] == pytest.approx([0.2])
    assert at_equal([FAST, SLOW], "flops", "accuracy", {"fast": 2.0, "slow": None})[1].keys() == {"fast"}
    assert at_equal([NONE], "steps", "accuracy", {}) == ([], {})
