"""compare compression: every cell a run of its own, read into rows; the front; the table, the files, the picture."""

import csv
import json
import re
import shutil
import signal
import sys

import pytest
from PIL import Image

from efficient_tx.commands import parts
from efficient_tx.compare import __main__ as command
from efficient_tx.compare.commands.compression import budgets
from efficient_tx.compare.compression import measure
from efficient_tx.compare.compression.measure import Metric, Row, Settings, cell, front
from efficient_tx.compare.compression.report import spread, table
from efficient_tx.compress.pipeline import Impossible
from efficient_tx.compression.cost import stored
from efficient_tx.compression.model import select
from efficient_tx.config.trained import trained_run
from efficient_tx.training import history
from efficient_tx.training.disk import write_checked
from efficient_tx.training.errors import Gone, Interrupted, InUse, NonFinite, Refused, RunError
from tests.support.command import finished_run, here


def compare_here(*arguments):
    """Runs the command in this process, on the data of the shared run."""
    return here(lambda: sys.exit(command.main(["compression", *arguments])))


def row(method, stored, score, **others):
    return Row(method, 0.5, stored=stored, scores=[score], **others)


@pytest.mark.quick
def test_the_front_has_no_row_that_another_beats():
    rows = [
        row("a", 10, 0.5),
        row("b", 10, 0.6),
        row("c", 5, 0.4),
        row("d", 7, 0.3),
        row("e", 20, 0.6),
        row("f", 5, 0.4),
    ]
    rows.append(row("g", 0, 0.0, refused="too large"))

    def best(higher_is_better):
        return [one.method for one in front(rows, lambda one: one.stored, Metric("score", higher_is_better))]

    assert best(True) == ["b", "c", "f"] and best(False) == ["c", "d", "f"]
    # After tuning the tuned score counts.
    rows[3].tuned = [0.9]
    assert best(True) == ["c", "d", "f"] and best(False) == ["c", "f"]


@pytest.mark.quick
def test_names_of_cells_and_values_of_flags():
    assert cell("svd", 0.5, 0) == "svd-0.5-0"
    assert (
        cell("sparse(pattern='2:4')+eora", 0.25, 2, "distilled 10, tuned 5")
        == "sparse_pattern_2_4_+eora-0.25-2-distilled10-tuned5"
    )
    assert parts("svd,flap") == ["svd", "flap"] and parts("sum(a=1,b=2);svd") == ["sum(a=1,b=2)", "svd"]
    assert budgets("0.25,0.75,0.25") == (0.75, 0.25)
    assert spread([0.5]) == "0.5000" and spread([0.4, 0.6]) == "0.5000 (0.4000 to 0.6000)"


@pytest.mark.quick
def test_what_cannot_be_is_one_line(tmp_path, capsys):
    for arguments, line in {
        ("--methods=svdd",): "--method=svdd: choose one of svd",
        ("--budgets=0,1",): "it must be above 0 and at most 1",
        ("--tune=-1",): "--tune=-1: it must be at least 0",
        (): "there is no finished run, it has no summary.json",
    }.items():
        with pytest.raises(SystemExit) as stop:
            command.parse(["compression", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", *arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and line in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "damage", "line"),
    [
        (["--where=mpl"], None, "where='mpl' selects no linear layer"),
        (["--tune=4", "--set", "optimizer.lr=1"], None, "--set=optimizer.lr=1: "),
        (["--tune=4", "--set", "model.features=32"], None, "--set=model.features=32: the model has other sizes"),
        ([], "config.json", "is not the workdir of a run"),
        ([], "checkpoints", "has no checkpoint"),
    ],
)
def test_what_no_cell_could_do_is_one_line_before_the_first(tmp_path, arguments, damage, line):
    run = shutil.copytree(finished_run()[0], tmp_path / "run")
    if damage:
        (run / damage).rename(tmp_path / damage)
    status, _, error = compare_here(f"--workdir={run}", f"--out={tmp_path / 'out'}", *arguments)
    assert status == 2 and line in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.fixture
def stopping(monkeypatch):
    """Cell -> the error with which it ends. The others are done in no time, and nothing is timed."""
    errors = {}

    def compressed(asked):
        if asked.out.name in errors:
            raise errors[asked.out.name]
        asked.out.mkdir(parents=True)
        write_checked(asked.out / "summary.json", {"val_accuracy": 0.5, "test_accuracy": 0.25 + asked.draw / 4})
        layers = {"up": {"error": 0.1, "tail": 0.2}}
        write_checked(asked.out / "compression.json", {"before": 10, "after": 5, "layers": layers})

    monkeypatch.setattr(measure, "compressed", compressed)
    monkeypatch.setattr(measure, "examine", lambda *_: None)
    return errors


def test_of_a_row_only_what_fails_is_lost(tmp_path, stopping):
    stopping |= {
        "flap-0.6-1-tuned4": NonFinite("the loss of step 2 is not finite"),
        "svd-0.6-0": Impossible("0.6: svd cannot meet it", option="budget"),
    }
    dense, svd, flap = measure.compare(Settings(finished_run()[0], ("svd", "flap"), (0.6,), tune=4), tmp_path / "runs")
    assert svd.refused == "--budget=0.6: svd cannot meet it" and not svd.scores + svd.tuned
    assert flap.refused is None and flap.failed == {"flap-0.6-1-tuned4": "the loss of step 2 is not finite"}
    assert (flap.scores, flap.tuned, flap.theory) == ([0.25, 0.5, 0.75], [0.25, 0.75], {"tail": 0.2})
    assert dense.tuned == [0.25] and not dense.failed


@pytest.mark.slow
def test_all_methods_keep_the_same_share_of_all_selected_layers(tmp_path, monkeypatch):
    """Also one that touches only some of them: the bytes of the cells' own models are counted."""
    run, budget = finished_run()[0], 0.7
    monkeypatch.setattr(measure, "examine", lambda *_: None)
    settings = Settings(run, ("svd", "id"), (budget, 0.5), draws=1, calibration=16)
    _, *rows = measure.compare(settings, tmp_path)
    before = sum(stored(layer.module) for layer in select(trained_run(run, "best")[2], settings.where))
    for row in rows:
        if row.refused is None:
            made = trained_run(tmp_path / cell(row.method, row.budget, 0), "best")[2]
            after = sum(stored(layer.module) for layer in select(made, settings.where))
            assert row.budget - 0.06 < after / before <= row.budget
            assert row.share == pytest.approx(after / before)
    ((gone,),) = [[row.refused for row in rows if row.refused]]
    others = r"id cannot meet it: the layers that it leaves as they are take 0\.\d{3} of the present bytes"
    assert re.fullmatch(rf"--budget=0\.5: {others}", gone)


@pytest.mark.quick
def test_a_refusal_has_the_budget_that_was_asked_for():
    error = Impossible("0.0512: id cannot meet it: its smallest layers take 0.1", option="budget")
    of = "--budget=0.5, 0.051 of the layers that change"
    assert measure.reason(error, 0.5, 0.0512) == f"{of}: id cannot meet it: its smallest layers take 0.1"
    assert measure.reason(error, 0.0512, 0.0512) == error.flag
    assert measure.reason(NonFinite("the loss is not finite"), 0.5, 0.1) == "the loss is not finite"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value", "line"), [
    ("step", 7, "is of step 7 of "), ("parameters", 1, "is of another run in "),
])  # fmt: skip
def test_cells_of_another_checkpoint_are_refused(tmp_path, name, value, line):
    """As after the run was trained further, or anew."""
    arguments = [f"--workdir={finished_run()[0]}", "--methods=svd", "--budgets=0.7", f"--out={tmp_path}", "--rounds=1"]
    assert compare_here(*arguments)[0] == 0
    record = tmp_path / "runs" / "svd-0.7-0" / "compression.json"
    whole = json.loads(record.read_text())
    write_checked(record, whole | {name: value})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, _, error = compare_here(*arguments, "--budgets=0.7,0.8")
    assert status == 2 and error.count("\n") == 1 and f"svd-0.7-0 {line}" in error
    assert error.endswith(f": use a new folder, or delete {tmp_path / 'runs'}\n")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # What an older version wrote has no checksum.
    write_checked(record, {key: entry for key, entry in whole.items() if key != "parameters"})
    assert compare_here(*arguments)[0] == 0


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (Interrupted(signal.SIGTERM, "step 2 of 4 is saved"), 143, "stopped by SIGTERM: step 2 of 4 is saved; "),
        (KeyboardInterrupt(), 130, "stopped by SIGINT; "),
        (RunError("cannot write it: No space left on device"), 1, "cannot write it: No space left on device; "),
        (Gone("it was deleted"), 1, "it was deleted"),
        (InUse("it is in use", option="workdir"), 2, "--workdir=it is in use"),
        (Refused("it has the result of another call", option="out"), 2, "--out=it has the result of another call"),
    ],
)
def test_what_stops_a_cell_stops_the_page(tmp_path, stopping, error, status, line):
    """And says how to go on, if the same command can; no row says of a method that it was refused."""
    stopping["svd-0.6-0"] = error
    arguments = [f"--workdir={finished_run()[0]}", "--methods=svd", "--budgets=0.75,0.6", f"--out={tmp_path / 'out'}"]
    found, _, said = compare_here(*arguments)
    again = "the same command goes on: python" if line.endswith("; ") else ""
    assert found == status and said.startswith(line + again) and said.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_dir()] == ["runs", "svd-0.75-0"]
    assert not list((tmp_path / "out").glob("compression.*"))


@pytest.mark.slow
def test_a_page(tmp_path):
    """Two methods at two budgets, two draws of the one that needs them, tuned and not; a second call only reads."""
    out = tmp_path / "page"
    arguments = [f"--workdir={finished_run()[0]}", "--methods=svd;flap", "--budgets=0.6,0.02", "--draws=2",
                 "--tune=4", "--set", "eval_every=4", "--calibration=32", "--rounds=1",
                 f"--out={out}"]  # fmt: skip
    status, said, error = compare_here(*arguments)
    assert status == 0, error
    record = json.loads((out / "compression.json").read_text())
    rows = {(one["method"], one["budget"]): one for one in record["rows"]}
    asked = {(name, budget) for name in ("svd", "flap") for budget in (0.6, 0.02)}
    assert set(rows) == {("dense", 1.0), *asked}
    dense, svd, flap = rows["dense", 1.0], rows["svd", 0.6], rows["flap", 0.6]
    assert dense["scores"] == [json.loads((finished_run()[0] / "summary.json").read_text())["test_accuracy"]]
    assert (len(svd["scores"]), len(svd["tuned"]), len(flap["scores"]), len(flap["tuned"])) == (1, 1, 2, 2)
    for one in (svd, flap):
        assert one["share"] <= 0.6 and one["stored"] < dense["stored"] and one["milliseconds"] > 0
    for name in ("svd", "flap"):
        assert "cannot meet it" in rows[name, 0.02]["refused"]
    # The model itself is tuned for as long.
    tuned = json.loads((out / "runs" / "dense-1-0-tuned4" / "summary.json").read_text())["test_accuracy"]
    assert dense["tuned"] == [tuned] and dense["stored"] > svd["stored"]
    assert len(history.read_lines(out / "runs" / "dense-1-0-tuned4" / "metrics.jsonl")) > 0
    cells = {path.name for path in (out / "runs").iterdir()}
    assert {"svd-0.6-0", "svd-0.6-0-tuned4", "flap-0.6-1", "flap-0.6-1-tuned4"} <= cells
    for path in (out / "runs").glob("*-0.6-*"):
        summary = json.loads((path / "summary.json").read_text())
        kept = rows[path.name.split("-")[0], 0.6]["tuned" if "tuned" in path.name else "scores"]
        assert summary["test_accuracy"] in kept
    with (out / "compression.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [one["method"] for one in record["rows"]]
    with Image.open(out / "compression.png") as picture:
        assert picture.width > 1000
    assert "accuracy of compressed models" in said and "flap" in said
    before = {path: path.stat().st_mtime for path in (out / "runs").rglob("metrics.jsonl")}
    assert compare_here(*arguments)[0] == 0
    assert before == {path: path.stat().st_mtime for path in (out / "runs").rglob("metrics.jsonl")}


@pytest.mark.quick
def test_the_table_has_a_row_for_each_and_says_why_there_is_none(tmp_path):
    dense = row("dense", 100, 0.9, milliseconds=2.0, multiplications=10)
    other = row("svd", 50, 0.8, milliseconds=1.0, multiplications=5, theory={"tail": 0.25})
    other.failed["svd-0.5-0-tuned4"] = "the loss of step 2 is not finite"
    gone = Row("monarch", 0.5, refused="--budget=0.5: cannot meet it")
    found = table([dense, other, gone], Settings(tmp_path, ("svd",), (0.5,)), Metric("accuracy", True))
    cells = [list(column.cells) for column in found.columns]
    assert found.row_count == 3
    (at,) = [i for i, name in enumerate(cells[1]) if name == "svd"]
    assert [column[at] for column in cells] == [
        "0.5", "svd", "50.0%", "0.8000", "—", "1.0", "0.50", "0.50", "0.000",
        "tail 0.250; svd-0.5-0-tuned4: the loss of step 2 is not finite",
    ]  # fmt: skip
    assert "--budget=0.5: cannot meet it" in cells[-1]
