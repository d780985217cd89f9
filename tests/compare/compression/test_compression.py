"""compare compression: every cell a run of its own, read into rows; the front; the table, the files, the picture."""

import csv
import json

import pytest
from PIL import Image

from efficient_tx.commands import parts
from efficient_tx.compare import __main__ as command
from efficient_tx.compare.commands.compression import budgets
from efficient_tx.compare.compression.measure import Row, Settings, cell, front
from efficient_tx.compare.compression.report import spread, table
from tests.support.command import finished_run, undone


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
    assert [one.method for one in front(rows, lambda one: one.stored)] == ["b", "c", "f"]
    # After tuning the tuned score counts.
    rows[3].tuned = [0.9]
    assert [one.method for one in front(rows, lambda one: one.stored)] == ["c", "d", "f"]


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
        (): "there is no finished run, it has no summary.json",
    }.items():
        with pytest.raises(SystemExit) as stop:
            command.parse(["compression", f"--workdir={tmp_path}", f"--out={tmp_path / 'out'}", *arguments])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and line in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_page(tmp_path, capsys):
    """Two methods at two budgets, two draws of the one that needs them, tuned and not; a second call only reads."""
    out = tmp_path / "page"
    arguments = ["compression", f"--workdir={finished_run()[0]}", "--methods=svd;flap", "--budgets=0.6,0.02",
                 "--draws=2", "--tune=4", "--set", "eval_every=4", "--calibration=32", "--rounds=1",
                 f"--out={out}"]  # fmt: skip
    with undone():
        assert command.main(arguments) == 0
    said = capsys.readouterr().out
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
    with undone():
        assert command.main(arguments) == 0
    assert before == {path: path.stat().st_mtime for path in (out / "runs").rglob("metrics.jsonl")}


@pytest.mark.quick
def test_the_table_has_a_row_for_each_and_says_why_there_is_none(tmp_path):
    dense = row("dense", 100, 0.9, milliseconds=2.0, multiplications=10)
    other = row("svd", 50, 0.8, milliseconds=1.0, multiplications=5, theory={"tail": 0.25})
    gone = Row("monarch", 0.5, refused="--budget=0.5: cannot meet it")
    found = table([dense, other, gone], Settings(tmp_path, ("svd",), (0.5,)), "accuracy")
    cells = [list(column.cells) for column in found.columns]
    assert found.row_count == 3
    (at,) = [i for i, name in enumerate(cells[1]) if name == "svd"]
    assert [column[at] for column in cells] == [
        "0.5", "svd", "50.0%", "0.8000", "—", "1.0", "0.50", "0.50", "0.000", "tail 0.250",
    ]  # fmt: skip
    assert "--budget=0.5: cannot meet it" in cells[-1]
