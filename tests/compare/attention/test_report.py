"""What sub-quadratic variants owe, in words."""

import pytest

from efficient_tx.compare.attention import report
from efficient_tx.compare.attention.measure import Row, Settings
from efficient_tx.compare.timing import PASSES, Cell

pytestmark = pytest.mark.quick


def row(name, seconds, *, cost="n", predicted=None, **about):
    """One whose forward takes a third of `seconds`, by length; None: not measured."""
    cells = {
        length: {
            a_pass: Cell(s and s / part, predicted and predicted / part, 10) for a_pass, part in zip(PASSES, (3, 1))
        }
        for length, s in seconds.items()
    }
    return Row(name, "", "", cost, False, "function", 7, cells=cells, **about)


def test_what_sub_quadratic_variants_owe():
    settings = Settings((1024, 4096, 16384), error_length=1024)
    softmax = row("softmax", {1024: 1, 4096: 16, 16384: None}, cost="n²", predicted=256)
    good = row("good", {1024: 2, 4096: 8, 16384: 32})
    slow = row("slow", {1024: 4, 4096: 20, 16384: 100}, cost="n·m + m³")
    slower = row("slower", {1024: 4, 4096: None, 16384: None}, cost="n log n")
    cubic = row("cubic", {1024: 30, 4096: None, 16384: None}, cost="n³")
    assert report.verdicts([softmax, good, slow, slower, cubic], settings) == [
        ("good: 2.0 × as fast as softmax at 4096, 8.0 × as fast as softmax (predicted) at 16384, exponent 1.00", []),
        (
            "slow: 0.8 × as fast as softmax at 4096, 2.6 × as fast as softmax (predicted) at 16384, exponent 1.16",
            ["0.8 × as fast as softmax at 4096", "exponent 1.16 > 1.15"],
        ),
        (
            "slower: too slow for 20 s at 4096, too slow for 20 s at 16384",
            ["too slow for 20 s at 4096", "too slow for 20 s at 16384"],
        ),
    ]
    assert report.verdicts([good], settings) == [("good: exponent 1.00", [])]
