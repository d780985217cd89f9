"""Times and rates of structures, against dense ones of the same width."""

import json

import pytest

from efficient_tx.compare.linear import report
from efficient_tx.compare.linear.measure import Row, Settings
from efficient_tx.compare.linear.plots import gains_and_losses
from efficient_tx.compare.timing import PASSES, Cell
from efficient_tx.linear import Form, LowRank

pytestmark = pytest.mark.quick


def row(structure, multiplies, seconds, *, packed=False, width=64):
    passes = PASSES[:1] if packed else PASSES
    cells = {name: Cell(s) for name, s in zip(passes, (seconds / 3, seconds))}
    return Row(structure, {}, packed, width, width, 7, multiplies, 8, cells)


def test_times_and_rates_are_against_dense_of_the_same_width():
    rows = [row("dense", 100, 6.0), row("a", 25, 2.0), row("b", 50, 6.0), row("c", 100, 1.0, packed=True)]
    rows += [row("dense", 400, 9.0, width=128), row("a", 50, 18.0, width=128)]
    assert [report.faster(made, rows) for made in rows] == [1, 3, 1, None, 1, 0.5]
    assert [report.faster(made, rows, "forward") for made in rows] == pytest.approx([1, 3, 1, 6, 1, 0.5])
    assert [report.rate(made, rows) for made in rows] == [1, 0.75, 0.5, None, 1, 0.0625]
    assert report.verdicts(rows) == [
        "b: 50% of the multiplications of dense at 64 features, 1.00 × as fast",
        "a: 12% of the multiplications of dense at 128 features, 0.50 × as fast",
    ]
    projected = [Row("b", {"rank": 3}, False, 6, 6, 7, 8, 9, error=0.5)]
    settings = Settings((64, 128), tokens=4)
    assert gains_and_losses(rows, projected, "W", settings, "here").startswith(b"\x89PNG")


def test_an_option_that_is_a_structure_is_its_text():
    made = Row("sum", {"second": Form(LowRank, rank=3)}, False, 6, 6, 7, 8, 9, error=0.5)
    record = json.loads(report.to_json([], [made], "W", Settings((64,)), "here"))
    assert record["projected"][0]["options"] == {"second": "low_rank(rank=3)"}
    assert made.name == "sum, second low_rank(rank=3)"
    assert "sum,second=low_rank(rank=3)," in report.to_csv([], [made])
