"""python -m efficient_tx.compare: what is written is what is printed, and mistakes are one line."""

import csv
import io
import json
import re
from dataclasses import asdict
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console

from efficient_tx.compare import __main__ as command
from efficient_tx.compare.attention import inputs, report
from efficient_tx.compare.attention.measure import Settings
from efficient_tx.compare.progress import progress
from efficient_tx.compare.timing import PASSES, Cell


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path, capsys):
    """Three variants at two tiny lengths: table, CSV and JSON hold the same figures; two pictures; no other files."""
    out = tmp_path / "new" / "folder"
    flags = "--lengths=32,16 --variants=vmean,softmax,pool --budget=8 --batch=2 --head_dim=4 --rounds=1"
    assert command.main(["attention", *flags.split(), f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "attention.csv", "attention.json", "error_time.png", "time_length.png",
    ]  # fmt: skip
    record = json.loads((out / "attention.json").read_text())
    lines = list(csv.DictReader((out / "attention.csv").read_text().splitlines()))
    assert record["settings"] == asdict(Settings((16, 32), 8, 20.0, 2, 2, 4, 1, 16)) | {"lengths": [16, 32]}
    assert record["machine"] in printed
    assert re.match(rf"cpu: .* cores, load .*; jax {re.escape(jax.__version__)}, ", record["machine"])
    assert [(line["variant"], line["length"]) for line in lines] == [
        (name, length) for name in ("softmax", "vmean", "pool") for length in ("16", "32")
    ]
    for line in lines:
        variant = next(each for each in record["variants"] if each["name"] == line["variant"])
        cell = variant["cells"][line["length"]]
        for a_pass in PASSES:
            assert float(line[f"{a_pass}_ms"]) == pytest.approx(1e3 * cell[a_pass]["seconds"])
            assert int(line[f"{a_pass}_temporary_bytes"]) == cell[a_pass]["temporary_bytes"]
        for family in inputs.FAMILIES:
            assert line[f"error_{family}"] == str(variant["errors"].get(family, ""))
        assert float(line["exponent"]) == variant["exponent"]
        assert (line["approximates"], line["timed"]) == {
            "softmax": ("softmax", "function"), "vmean": ("softmax", "function"), "pool": ("", "module"),
        }[line["variant"]]  # fmt: skip
        shown = report.milliseconds(Cell(cell["forward_backward"]["seconds"]))
        assert re.search(rf"\b{line['variant']}\*? .*\b{re.escape(shown)}\b", printed)
    sizes = {each["name"]: each["parameters"] for each in record["variants"]}
    assert sizes == {"softmax": 4 * (8 * 8 + 8), "vmean": 2 * (8 * 8 + 8), "pool": 0}
    for picture in ("error_time.png", "time_length.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_calls_that_would_take_too_long_are_not_made(tmp_path, capsys):
    """No prediction at the shortest length; a limit of a nanosecond stops everything after it."""
    flags = "--lengths=8,16 --variants=vmean --batch=1 --heads=1 --head_dim=2 --rounds=1 --max_seconds=1e-9"
    assert command.main(["attention", *flags.split(), f"--out={tmp_path}"]) == 0
    first, second = csv.DictReader((tmp_path / "attention.csv").read_text().splitlines())
    assert float(first["forward_ms"]) > 0
    assert second["forward_ms"] == second["forward_backward_ms"] == second["forward_temporary_bytes"] == ""
    assert re.search(r"vmean .*│ +— │ +— │ +— │", capsys.readouterr().out)


def test_an_interrupted_comparison_writes_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.COMMANDS["attention"], "compare", interrupted)
    assert command.main(["attention", f"--out={tmp_path}"]) == 130
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == "stopped: nothing was written\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "choose one of attention, linear, decode, compression, table"),
        (["atention"], "nearest: 'attention'"),
        (["attention", "--lenghts=8"], "--lenghts=8 is no flag of attention: the nearest is --lengths"),
        (["attention", "--lengths=8,x"], "'x' is no whole number of at least 1"),
        (["attention", "--budget=0"], "argument --budget: '0' is no whole number"),
        (["attention", "--max_seconds=-1"], "'-1' is no number above 0"),
        (["attention", "--variants=softmax,skyfromer"], "nearest: 'skyformer'"),
        (["attention", "--lengths=8,16", "--error_length=4"], "--error_length=4: use one of the lengths, 8, 16"),
        (["table", "--wirte=README.md"], "the nearest is --write"),
        (["table", "README.md"], "'README.md' is no flag of table: flags begin with two dashes, as --"),
        (["attention", "softmax"], "'softmax' is no flag of attention: flags begin with two dashes, as --"),
        (["help"], "'help' is no command: choose one of attention, linear, decode, compression, table"),
        (["linear", "--features=8,0"], "argument --features: '0' is no whole number of at least 1"),
        (["linear", "--structures=monrach"], "'monrach' is no structure: choose of dense"),
        (["linear", "--share=-1"], "'-1' is no number above 0"),
        (["linear", "--weight=a.npy", "--run=b"], "--weight and --run both name a weight"),
        (["linear", "--layer=mlp.up"], "name the run with --run"),
        (["linear", "--token=8"], "--token=8 is no flag of linear: the nearest is --tokens"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    error = capsys.readouterr().err
    assert (stopped.value.code, error.count("\n")) == (2, 1)
    assert words in error


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command.main(["attention", f"--out={tmp_path}/file/folder"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_command_of_structures_writes_what_it_prints(tmp_path, capsys):
    """Two structures, and dense unasked: the same figures on the terminal, in CSV and JSON; a picture."""
    np.save(tmp_path / "w.npy", np.random.default_rng(0).normal(size=(12, 8)))
    out = tmp_path / "new" / "folder"
    flags = f"--features=8 --structures=ternary,monarch --tokens=4 --rounds=1 --weight={tmp_path}/w.npy --out={out}"
    assert command.main(["linear", *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["linear.csv", "linear.json", "linear.png"]
    record = json.loads((out / "linear.json").read_text())
    lines = list(csv.DictReader((out / "linear.csv").read_text().splitlines()))
    assert record["settings"] == {"features": [8], "tokens": 4, "rounds": 1, "share": 0.5}
    assert record["machine"] in printed
    assert re.fullmatch(
        r"12 × 8, the matrix in .*/w.npy; 99 % of its squares are in \d singular directions", record["weight"]
    )
    timed = [("dense", ""), ("monarch", "blocks=4"), ("monarch", "blocks=32"), ("ternary", ""), ("ternary", "")]
    expected = [(*pair, "8") for pair in timed] + [("monarch", "blocks=2", "12"), ("ternary", "", "12")]
    assert [(line["structure"], line["options"], line["in_features"]) for line in lines] == expected
    assert [line["packed"] for line in lines] == [*4 * ["False"], "True", "False", "True"]
    for line, made in zip(lines, [*record["timed"], *record["projected"]]):
        assert (line["bytes"], line["multiplies"]) == (str(made["stored"]), str(made["multiplies"]))
        assert line["error"] == str(made["error"] or "")
        for name in PASSES:
            seconds = made["cells"].get(name, {"seconds": None})["seconds"]
            assert line[f"{name}_ms"] == ("" if seconds is None else str(1e3 * seconds))
    for made in record["projected"]:
        assert re.search(rf"{made['structure']}.* {made['stored']:,} .*{made['error']:.3f}", printed)
    assert re.search(r"dense .* 64 │ +64 │ +256 │ .* 1.00 │ +100% │", printed)
    assert (out / "linear.png").read_bytes().startswith(b"\x89PNG")


def test_a_weight_that_is_not_there_is_one_line(tmp_path, capsys):
    assert command.main(["linear", f"--weight={tmp_path}/w.npy"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "w.npy" in error


def test_quick_changes_defaults_only():
    args = command.parse(["attention", "--quick"])
    assert (args.lengths, args.rounds, args.max_seconds, args.error_length) == ((256, 1024), 2, 2.0, 256)
    args = command.parse(["attention", "--quick", "--lengths=64", "--rounds=3"])
    assert (args.lengths, args.rounds, args.max_seconds) == ((64,), 3, 2.0)
    args, usual = command.parse(["attention"]), Settings(())
    assert (args.lengths, args.rounds, args.max_seconds) == ((1024, 4096, 16384), usual.rounds, usual.max_seconds)


def test_progress_is_told_where_there_is_no_terminal(monkeypatch, capsys):
    """A line every ten seconds, on standard error."""
    now = [0.0]
    monkeypatch.setattr("efficient_tx.compare.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    with progress(Console(file=io.StringIO())) as say:
        for now[0] in range(0, 30, 4):
            say(f"step {now[0]}")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "12 s: step 12\n24 s: step 24\n")
