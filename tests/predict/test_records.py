"""What is known of finished runs: each function once, and of one budget."""

import json

import pytest

from efficient_tx.predict import records
from efficient_tx.predict.__main__ import repeated, trusted
from efficient_tx.predict.ranking import scored

pytestmark = pytest.mark.quick


def row(method, final, *, budget=0.01, error=None, gradsign=0.2, **others):
    made = {"task": "a", "method": method, "final": final, "budget": budget, "error": error, "gradsign": gradsign}
    return {"parameters": 100, "alignment": 0.3, "validation_loss": 2 - final, **made, **others}


def test_methods_that_are_one_function_count_once():
    """An approximation with a budget of all tokens; not two exact functions, nor two without an exact one."""
    others = [
        row("kernelized", 0.5, error=0.0, gradsign=0.25),
        row("linear", 0.4),
        row("gla", 0.3),
        row("coarse", 0.2, error=0.1),
    ]
    softmax = row("softmax", 0.6, error=0.0)
    again = [row("lev", 0.61, error=9e-8, gradsign=0.200002), row("local", 0.59, error=1e-7)]
    (once,), (all_of_them,) = (records.known(rows, 0.01) for rows in ([softmax, *others], [*again, *others, softmax]))
    assert {*once.methods} == {*all_of_them.methods} == {"softmax", "kernelized", "linear", "gla", "coarse"}
    for name, (found,) in scored([once]).items():
        assert scored([all_of_them])[name] == [found if found is None else pytest.approx(found)]
    assert repeated([*again, *others, softmax]) == ["softmax, lev, local are one function on a"]
    assert repeated(others) == []


def test_no_function_comes_twice_with_the_package():
    """Different functions have different losses after their short runs, and one has the same to seven digits."""
    for task in records.known(records.read(records.SHIPPED, "known"), 0.01):
        losses = [f"{one['validation_loss']:.7g}" for one in task.measures]
        assert len({*losses}) == len(losses), task.task


def test_rows_of_several_budgets_are_not_mixed(tmp_path):
    """Of each task those of the nearest budget that has enough of them, whatever was written last."""
    many = [row(name, final, budget=0.01) for name, final in (("a", 0.1), ("b", 0.2), ("c", 0.3), ("d", 0.4))]
    some = [row(name, final, budget=0.1) for name, final in (("a", 0.1), ("b", 0.2), ("c", 0.3))]
    few = [row(name, final, budget=0.5) for name, final in (("a", 0.1), ("b", 0.2))]
    records.save(tmp_path / "a.json", [*many, *some, *few])
    rows = records.read(tmp_path / "a.json", "known")
    for asked, budget, count in ((0.01, 0.01, 4), (0.03, 0.01, 4), (0.04, 0.1, 3), (0.1, 0.1, 3), (0.5, 0.1, 3)):
        (task,) = records.known(rows, asked)
        assert [one["budget"] for one in task.measures] == [budget] * count
    says = "these were measured after 0.01 of the steps, the methods here after 0.1"
    assert [line for line in trusted(records.known(many, 0.1), 0.1) if says in line]
    assert not [line for line in trusted(records.known(many, 0.01), 0.01) if "were measured after" in line]


def test_a_file_that_says_its_budget_once_is_read(tmp_path):
    old = row("a", 0.1)
    del old["budget"]
    for said, budget in (({"budget": 0.02}, 0.02), ({}, None), ({"budget": 2}, None)):
        (tmp_path / "a.json").write_text(json.dumps({**said, "rows": [old]}))
        if budget:
            assert [one["budget"] for one in records.read(tmp_path / "a.json", "known")] == [budget]
        else:
            with pytest.raises(ValueError, match="it holds no measures"):
                records.read(tmp_path / "a.json", "known")
