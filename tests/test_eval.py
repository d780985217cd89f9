"""eval.py: the numbers of the run, on any batch size and devices, other mixers under the same weights, one table."""

import csv
import io
import json
import os
import shutil
import signal

import numpy as np
import pytest
from rich.console import Console

from efficient_tx.config.build import build_task
from efficient_tx.config.stored import restore
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.disk import write_checked
from tests.support import toy
from tests.support.command import evaluate, evaluate_here, finished_run


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def run(tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished_run()[0], tmp_path / "run")


def rows(out):
    """The cells of every row of every table in the output."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]


def damage(folder):
    file = max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(file, file.stat().st_size // 2)


def test_best_and_last_score_what_the_run_said(run):
    summary, expected = read(run / "summary.json"), {}
    for which in ("best", "last"):
        status, out, error = evaluate_here(f"--workdir={run}", f"--checkpoint={which}")
        assert (status, error) == (0, "")
        result = read(run / f"eval_test_{which}.json")
        expected = summary["test_accuracy" if which == "best" else "last_test_accuracy"]
        assert result["accuracy"] == expected and result["count"] == 50
        assert result["step"] == (summary["best_step"] if which == "best" else 40)
        assert (result["task"], result["split"], result["checkpoint"]) == ("listops", "test", which)
        assert result["parameters"] == summary["parameters"] and result["protocol"] == "default"
        ((task, name, seed, step, accuracy, loss, count, parameters, _, speed, memory),) = rows(out)
        assert (task, name, seed, step) == ("listops", str(run), "0", str(result["step"]))
        # Of n answers, a share p of them right: √(p(1−p)/(n−1)).
        error = (result["accuracy"] * (1 - result["accuracy"]) / 49) ** 0.5
        assert result["standard_error"]["accuracy"] == pytest.approx(error)
        assert accuracy == f"{result['accuracy']:.4f} ±{error:.4f}" and loss.startswith(f"{result['loss']:.4f} ±")
        assert (count, parameters) == ("50", f"{summary['parameters']:,}")
        assert (speed, memory[-3:]) == (f"{summary['steps_per_second']:.2f}", " GB")
        for name, score in summary["baselines"].items():
            assert f"{name} {score:.4f}" in out


def test_a_narrow_terminal_says_what_it_leaves_out(run, monkeypatch):
    """And no number means more than it does: ± knows of the items alone."""
    monkeypatch.setattr("efficient_tx.eval.Console", lambda **options: Console(**{**options, "width": 80}))
    status, out, error = evaluate_here(f"--workdir={run}")
    assert (status, error) == (0, "") and max(map(len, out.splitlines()[:8])) <= 80
    (heads,) = [line for line in out.splitlines() if line.startswith("┃")]
    shown = [head.strip() for head in heads.strip("┃").split("┃")]
    (left_out,) = [line for line in out.splitlines() if line.startswith("left out for want of width: ")]
    assert left_out.endswith("; --format=md has all")
    missing = left_out.removesuffix("; --format=md has all").partition(": ")[2].split(", ")
    wanted = "task run seed step accuracy loss count parameters examples/s steps/s memory"
    assert shown + missing == wanted.split()
    assert "over the items of the split alone; what other seeds or draws change is not in it" in out


def test_batch_size_and_devices_change_nothing(run):
    """Validation at a step, against the line that the run wrote there; every item counts once."""
    options = [f"--workdir={run}", "--split=validation", "--checkpoint=40", "--batch_size=7"]
    status, _, error = evaluate_here(*options)
    assert (status, error) == (0, "")
    result, line = read(run / "eval_validation_40.json"), toy.lines(run)[-1]
    assert (result["count"], result["batch_size"], result["device"]["count"]) == (50, 8, 4)
    # Sums of float32 in another order.
    assert result["accuracy"] == line["accuracy"] and result["loss"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.slow
def test_the_same_weights_under_other_settings(run):
    """Skyformer has the parameters of softmax attention; with landmarks enough it is another approximation."""
    other = shutil.copytree(run, run.parent / "other")
    write_checked(other / "config.json", read(other / "config.json") | {"protocol": "lra"})
    both = [f"--workdir={run}", f"--workdir={other}", "--checkpoint=40"]
    settings = ["mixers=skyformer", "attention.skyformer.landmarks=4"]
    status, out, error = evaluate_here(*both, "--set", *settings)
    assert (status, error) == (0, "")
    # Numbers of two protocols never share a table.
    assert [out.count(f"protocol {name}") for name in ("default", "lra")] == [1, 1] and out.count("┃ task") == 2
    assert [row[1] for row in rows(out)] == [f"{path} {','.join(settings)}" for path in (run, other)]
    name = f"eval_test_40_{','.join(settings)}.json"
    assert read(run / name)["set"] == {"mixers": "skyformer", "attention.skyformer.landmarks": "4"}
    assert read(run / name)["loss"] == read(other / name)["loss"]
    status, out, error = evaluate_here(f"--workdir={run}", "--checkpoint=40", "--set", "dtype=bfloat16")
    assert (status, error) == (0, "")
    half = read(run / "eval_test_40_dtype=bfloat16.json")
    assert half["parameters"] == read(run / name)["parameters"] and half["loss"] != read(run / name)["loss"]


@pytest.mark.slow
def test_draws_are_other_draws_of_the_same_weights(run):
    """The first one is the evaluation as ever; a mixer that draws nothing says so."""
    options = [f"--workdir={run}", "--checkpoint=40", "--draws=3"]
    status, out, error = evaluate_here(*options, "--set", "mixers=skyformer", "attention.skyformer.landmarks=4")
    assert (status, error) == (0, "")
    result = read(run / "eval_test_40_mixers=skyformer,attention.skyformer.landmarks=4_draws=3.json")
    plain = read(run / "eval_test_40_mixers=skyformer,attention.skyformer.landmarks=4.json")
    assert plain == {key: value for key, value in result.items() if key != "draws"}
    losses = result["draws"]["loss"]
    assert losses[0] == result["loss"] and len(set(losses)) == 3
    assert f"accuracy over 3 draws: mean {sum(result['draws']['accuracy']) / 3:.4f}" in out
    status, out, error = evaluate_here(*options)
    assert (status, error) == (0, "") and "the draws are equal, as its mixers draw nothing" in out
    scored = (run / "eval_test_40_draws=3.json").read_bytes()
    assert evaluate_here(*options[:2])[0] == 0 and (run / "eval_test_40_draws=3.json").read_bytes() == scored


def test_predictions_are_those_that_were_scored(run):
    """In the order of the split, whatever the batch size; and several paths after one --workdir, as Markdown."""
    other = shutil.copytree(run, run.parent / "other")
    files = []
    for size in (7, 64):
        arguments = ["--workdir", run, other, f"--batch_size={size}", "--save_predictions", "--format=md"]
        status, out, error = evaluate_here(*arguments)
        assert (status, error) == (0, "") and out.count("\n| listops | ") == 2
        result = read(run / "eval_test_best.json")
        with np.load(run / "predictions_test_best.npz") as file:
            files.append(dict(file))
    small, large = files
    np.testing.assert_array_equal(small["label"], large["label"])
    task = build_task(restore(read(run / "config.json")))
    assert small["label"].tolist() == [task.test[item]["label"] for item in range(50)]
    assert (small["prediction"] == small["label"]).mean() == result["accuracy"]
    assert small["accuracy"].sum() / small["accuracy_count"].sum() == result["accuracy"]
    np.testing.assert_array_equal(small["output"].argmax(-1), small["prediction"])
    np.testing.assert_allclose(small["output"], large["output"], atol=1e-5)  # float32, products of another shape
    logits = small["output"].astype(np.float64)
    loss = np.log(np.exp(logits).sum(-1)) - logits[np.arange(50), small["label"]]
    np.testing.assert_allclose(small["loss"], loss, rtol=1e-5, atol=1e-6)  # float32
    assert result["standard_error"]["loss"] == pytest.approx(loss.std(ddof=1) / 50**0.5, rel=1e-4)


def test_a_table_for_a_program_has_whole_rows_however_long_they_are(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    long = run.parent / "/".join(["a" * 100] * 3) / "run"
    shutil.copytree(run, long)
    status, out, error = evaluate_here("--workdir", run, long, "--format=csv", "--draws=2")
    head, *lines = csv.reader(io.StringIO(out))
    assert status == 0 and [len(line) for line in lines] == [len(head)] * 2
    assert {line[2] for line in lines} == {str(run), str(long)}
    assert "the draws are equal" in error and "to beat on listops" in error
    _, out, _ = evaluate_here("--workdir", run, long, "--format=md")
    assert len({line.count(" | ") for line in out.splitlines() if line.startswith("| ")}) == 1


def test_many_settings_have_a_file_all_the_same(run):
    """A file's name has at most 255 bytes, and no two settings share one."""
    same = "task.max_len=24 task.min_len=4 task.train_size=300 task.val_size=50 task.test_size=50 model.features=16"
    same += " model.mlp_features=32 model.layers=1 model.heads=2 attention.skyformer.landmarks=8 mixers=skyformer"
    names = set()
    for last in ("model.dropout=0.2", "model.dropout=0.3"):
        status, _, error = evaluate_here(f"--workdir={run}", "--set", *same.split(), last)
        assert (status, error) == (0, "")
        (name,) = {path.name for path in run.glob("eval_test_best_*")} - names
        names.add(name)
        assert len(name) < 255 and read(run / name)["set"]["model.dropout"] == last[-3:]
    status, _, error = evaluate_here(f"--workdir={run}", "--set", "model.layers=1", "model.layers=2")
    assert status == 2 and error == "--set model.layers is given twice: one evaluation has one value\n"


def test_what_does_not_fit_is_named_and_the_others_are_evaluated(run):
    """Linformer has parameters that skyformer lacks; a folder that is no run; a run without checkpoints."""
    status, out, error = evaluate_here(f"--workdir={run}", "--set", "mixers=linformer")
    assert status == 2 and error.count("\n") == 1 and rows(out) == []
    assert "does not fit: it has no params.encoder.blocks.0.mixer." in error
    bare = run.parent / "bare"
    bare.mkdir()
    shutil.copy(run / "config.json", bare)
    status, out, error = evaluate_here(f"--workdir={run.parent}", f"--workdir={bare}", f"--workdir={run}")
    assert status == 2 and len(rows(out)) == 1
    assert error.splitlines() == [
        f"{run.parent} is not the workdir of a run: there is no {run.parent}/config.json",
        f"{bare} has no checkpoint yet: train it first",
    ]


def test_a_damaged_checkpoint_is_named_and_the_next_stands_in(run):
    steps = Checkpoints(run / "checkpoints").steps()
    damage(run / "checkpoints" / str(steps[-1]))
    status, out, error = evaluate_here(f"--workdir={run}", "--checkpoint=last")
    assert status == 0 and error.count("\n") == 1 and rows(out)[0][3] == str(steps[-2])
    assert f"checkpoints/{steps[-1]} is damaged" in error and f"using {steps[-2]} instead" in error
    assert read(run / "eval_test_last.json")["step"] == steps[-2]


def test_a_damaged_workdir_does_not_end_the_others(run):
    """Nor does a pattern that matches it; a workdir that exists is no pattern."""
    names = ("a[1]", "a1", "a2", "a3")
    for name in names:
        shutil.copytree(run, run.parent / name)
    (run.parent / "a1" / "config.json").write_text("{")
    (run.parent / "a2" / "crc32.json").unlink()
    (run.parent / "a2" / "config.json").write_text('{"mixers": 3, "task": {"name": "lra.listops"}}')
    status, out, error = evaluate_here(f"--workdir={run.parent}/a*", f"--workdir={run.parent}/a[1]")
    assert status == 2 and [row[1] for row in rows(out)] == [f"{run.parent}/{name}" for name in ("a3", "a[1]")]
    first, second = error.splitlines()
    assert (
        first.startswith(f"{run.parent}/a1/config.json is damaged (its CRC-32 differs") and "a2: config.json" in second
    )


def test_a_batch_beyond_measure_and_lack_of_memory_are_one_line(run, monkeypatch):
    status, out, error = evaluate_here(f"--workdir={run}", f"--batch_size={10**15}")
    assert (status, out) == (2, "")
    assert error == f"--batch_size={10**15}: the test split of {run} has 50 items: use at most 4096\n"

    def evaluate(*_):
        raise MemoryError

    monkeypatch.setattr("efficient_tx.eval.make_evaluate", lambda *_, **__: evaluate)
    status, out, error = evaluate_here(f"--workdir={run}", "--batch_size=64")
    assert (status, out) == (2, "") and error.count("\n") == 1
    assert f"{run}: 64 rows at once need more memory than there is" in error


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_line(run, monkeypatch, number, ending):
    monkeypatch.setattr("efficient_tx.eval.build_task", lambda *_: signal.raise_signal(number))
    status, out, error = evaluate_here(f"--workdir={run}")
    assert (status, out, error.count("\n")) == (ending, "", 1) and error.startswith(f"stopped by {number.name}: ")


@pytest.mark.slow
def test_a_run_of_four_devices_is_evaluated_on_three(run):
    """As a process: validation at a step, against the line that the run wrote there; every item counts once."""
    options = [f"--workdir={run}", "--split=validation", "--checkpoint=40", "--batch_size=7"]
    status, _, error = evaluate(*options, devices=3)
    assert (status, error) == (0, "")
    result, line = read(run / "eval_validation_40.json"), toy.lines(run)[-1]
    assert (result["count"], result["batch_size"], result["device"]["count"]) == (50, 9, 3)
    # Sums of float32 in another order.
    assert result["accuracy"] == line["accuracy"] and result["loss"] == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--checkpoint=7"], "--checkpoint=7: RUN has best, last and the steps"),
        (["--checkpoint=newest"], "--checkpoint=newest: RUN has best, last and the steps"),
        (["--split=tests"], "argument --split: invalid choice: 'tests'"),
        (["--set", "mixers"], "'mixers' is no KEY=VALUE"),
        (["--set", "mixer=softmax"], "--set mixer=softmax: config.mixer is no key: the nearest is mixers"),
        (["--set", "mixers=skyfromer"], "--set mixers=skyfromer: config.mixers is 'skyfromer': choose one of"),
        (["--set", "model.heads=3"], "--set model.heads=3: config.model.heads is 3"),
        (["--set", "steps=3"], "--set steps=3: config.steps has no part in an evaluation"),
        (["--draws=0"], "argument --draws: '0' is no whole number"),
        (["--batch_size=0"], "--batch_size=0: must be at least 1"),
        (["--work"], "--work is no flag: the nearest is --workdir"),
        (["--set", "task.source=/nowhere"], "/nowhere"),
        (["RUN"], "'RUN' is no flag: flags begin with two dashes, as --"),
    ],
)
def test_mistakes_are_one_line(run, arguments, reason):
    arguments = [argument.replace("RUN", str(run)) for argument in arguments]
    status, out, error = evaluate_here(f"--workdir={run}", *arguments)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert reason.replace("RUN", str(run)) in error
