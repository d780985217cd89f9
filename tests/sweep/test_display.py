"""What a sweep shows: how far its runs are, and the time left."""

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from efficient_tx.sweep.display import Clock, Display, clock
from efficient_tx.sweep.plan import Cell, Method
from efficient_tx.sweep.runner import Child, Failure
from efficient_tx.sweep.watch import latest

pytestmark = pytest.mark.quick

ONE, TWO = (Cell(Method(name, "dense"), {}, [{}]) for name in ("softmax", "gla"))


def run(cell, name, folder, steps=100, purpose="run"):
    config = SimpleNamespace(steps=steps)
    return SimpleNamespace(cell=cell, name=name, workdir=folder / name, config=config, purpose=purpose)


def test_the_time_left_is_that_of_the_cells_own_steps(tmp_path):
    predicted, mine = Clock(), run(ONE, "a", tmp_path)
    assert predicted.left(ONE, 10) is None
    predicted.saw(mine, 5, 100.0)  # it may have been resumed at 5: that took no time here
    assert predicted.left(ONE, 10) is None
    predicted.saw(mine, 25, 110.0)
    assert predicted.left(ONE, 10) == pytest.approx(5.0)
    assert predicted.left(TWO, 10) == pytest.approx(5.0)  # nothing is known of it
    predicted.ended(run(TWO, "b", tmp_path), {"steps_per_second": 10.0})
    assert predicted.left(TWO, 10) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("count", "purpose", "later", "jobs", "left"),
    [
        (1, "run", {}, 4, "1:00:00"),  # one run takes its time, however many might run beside it
        (5, "run", {}, 4, "1:15:00"),
        (5, "run", {}, 1, "5:00:00"),
        (1, "tune", {ONE: 3}, 4, "2:00:00"),  # what is chosen runs after what chooses
    ],
)
def test_the_time_left_is_at_least_that_of_the_longest_run(tmp_path, count, purpose, later, jobs, left):
    runs = [run(ONE, f"one{i}", tmp_path, steps=3600, purpose=purpose) for i in range(count)]
    before = run(ONE, "before", tmp_path, steps=3600)
    runner = SimpleNamespace(
        live=[], results={"before": {"steps_per_second": 1.0}}, failures={}, busy=set(), paused=set()
    )
    out = io.StringIO()
    Display(Console(file=out, width=120), [before, *runs], later, jobs).show(runner)
    assert f"; {left} left" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(None, "-:--:--"), (0.4, "0:00:00"), (3723, "1:02:03")])
def test_times_are_read_easily(seconds, text):
    assert clock(seconds) == text


def test_the_latest_line_is_found_while_it_is_written(tmp_path):
    assert latest(tmp_path) == {}
    lines = [{"step": step, "split": "train", "loss": 1.0} for step in range(1000)]
    lines[-2] = {"step": 998, "split": "validation", "loss": 1.0, "accuracy": 0.25}
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / "metrics.jsonl").write_text(text + '\n{"step": 10')
    seen = latest(tmp_path)
    assert (seen["last"]["step"], seen["score"]) == (999, "accuracy 0.2500")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_table_has_a_row_for_each_run(tmp_path, terminal):
    runs = [run(ONE, f"one{i}", tmp_path) for i in range(3)] + [run(TWO, "two0", tmp_path)]
    runs[1].workdir.mkdir()
    line = {"step": 40, "split": "validation", "loss": 1.0, "accuracy": 0.25}
    (runs[1].workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    runner = SimpleNamespace(
        live=[Child(runs[1], None, None, 0)],
        results={"one0": {"val_accuracy": 0.5, "steps_per_second": 10.0}},
        failures={"one2": Failure(runs[2], -9, tmp_path, ["x"])},
        busy=set(),
        paused=set(),
    )
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, height=40)
    display = Display(console, runs, {TWO: 2}, jobs=1)
    with display:
        display.show(runner)
        assert "6 runs: 1 finished, 1 running, 1 failed, 3 to do; 0:00:36 left" in out.getvalue()
    if terminal:
        for words in ("accuracy 0.5000", "40/100", "accuracy 0.2500", "ended by SIGKILL", "two0"):
            assert words in out.getvalue()
