"""compress.py: a run made smaller is a run: evaluated, tuned, started from, compressed again; killed and gone on."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from efficient_tx.compress.asked import Asked
from efficient_tx.compress.result import checksum
from efficient_tx.compress.source import calibration
from efficient_tx.compression.model import kernel_of, select
from efficient_tx.compression.statistics import gather
from efficient_tx.config.trained import trained_run
from efficient_tx.linear.replacement import find
from efficient_tx.training.checkpoint import Checkpoints
from tests.support import toy
from tests.support.command import (
    as_here,
    compress_here,
    evaluate_here,
    finish,
    finished_run,
    start,
    train_here,
    wait_for_step,
)


def read(path):
    return json.loads(path.read_text())


def compress(out, *arguments, run=None):
    return compress_here(f"--workdir={run or finished_run()[0]}", f"--out={out}", *arguments)


def arrays(workdir, step=0):
    return Checkpoints(workdir / "checkpoints").arrays(step)


@pytest.mark.slow
def test_the_result_is_a_run_that_evaluates_and_compresses_again(tmp_path):
    out = tmp_path / "small"
    status, said, error = compress(out, "--method=flap", "--budget=0.6")
    assert (status, error) == (0, "")
    record, config = read(out / "compression.json"), read(out / "config.json")
    assert record["share"] <= 0.6 and f"({record['share']:.1%})" in said
    structure = config["structure"]
    up, down = structure["encoder.blocks.0.mlp.up"], structure["encoder.blocks.0.mlp.down"]
    assert up["name"] == "dense" and up["out_features"] == down["in_features"] < 32 and up["in_features"] == 16
    heads = structure.get("encoder.blocks.0.mixer", {"heads": 2})["heads"]
    assert structure["encoder.blocks.0.mixer.q"]["out_features"] == heads * 8
    # Bytes, counted from what the checkpoint holds.
    stored = sum(
        array.nbytes for name, array in arrays(out).items() if re.match(r"params.*(mlp\.(up|down)|mixer\.\w+)\.", name)
    )
    assert stored == record["after"]
    summary = read(out / "summary.json")
    status, _, error = evaluate_here(f"--workdir={out}")
    assert (status, error) == (0, "")
    assert read(out / "eval_test_best.json")["accuracy"] == summary["test_accuracy"]
    assert summary["parameters"] == read(out / "eval_test_best.json")["parameters"]
    # Again, by another method; the first structure is the ground that the second stands on.
    again = tmp_path / "smaller"
    status, _, error = compress(again, "--method=svd", "--budget=0.7", "--where=mlp", run=out)
    assert (status, error) == (0, "")
    second = read(again / "config.json")["structure"]
    assert second["encoder.blocks.0.mlp.up"]["name"] == "low_rank"
    assert second["encoder.blocks.0.mlp.up"]["out_features"] == up["out_features"]
    assert second["encoder.blocks.0.mixer.q"] == structure["encoder.blocks.0.mixer.q"]
    assert evaluate_here(f"--workdir={again}")[0] == 0


@pytest.mark.slow
def test_low_rank_beside_a_weight_approximation_is_a_method(tmp_path):
    out = tmp_path / "sum"
    arguments = ["--method=sum(first='sparse(density=0.25)')", "--budget=0.7", "--where=mlp"]
    assert compress(out, *arguments)[::2] == (0, "")
    entry = read(out / "config.json")["structure"]["encoder.blocks.0.mlp.up"]
    assert (entry["name"], entry["first"]) == ("sum", "sparse(density=0.25)")
    assert re.fullmatch(r"low_rank\(rank=[1-9]\)", entry["second"])
    assert read(out / "compression.json")["share"] <= 0.7
    assert evaluate_here(f"--workdir={out}")[0] == 0
    assert read(out / "eval_test_best.json")["accuracy"] == read(out / "summary.json")["test_accuracy"]


def test_an_estimate_writes_nothing(tmp_path):
    run = finished_run()[0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    arguments = [f"--workdir={run}", "--budget=0.5", "--where=mlp", "--estimate"]
    status, said, error = compress_here(*arguments)
    assert (status, error) == (0, "")
    assert re.search(r"2 layers: [\d,]+ bytes become [\d,]+ \((4\d|50)\.\d%\)", said)
    assert re.search(r"encoder\.blocks\.0\.mlp\.up .* low_rank\(rank=\d\) .* 0\.\d\d ", said)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for more, line in {
        ("--method=svd",): "--method is of a result, and --estimate makes none",
        ("--set", "steps=3"): "--set is of a result",
        ("--where=mpl",): "where='mpl' selects no linear layer",
        ("--budget=0.01",): "--budget=0.01: svd cannot meet it",
        ("--budget=2",): "--budget=2.0: it must be above 0 and at most 1",
    }.items():
        status, said, error = compress_here(*arguments, *more)
        assert (status, error.count("\n")) == (2, 1) and error.startswith(line), error


@pytest.mark.slow
def test_a_method_of_gradients_has_those_of_the_loss_of_training(tmp_path):
    options = ("--where=mlp", "--calibration=8", "--budget=0.6")
    status, _, error = compress(tmp_path, "--method=wlra(weights_rank=2,gradients=2)", *options)
    assert (status, error) == (0, "")
    layer = read(tmp_path / "config.json")["structure"]["encoder.blocks.0.mlp.up"]
    assert (layer["name"], layer["terms"]) == ("hadamard_quotient", 2)
    assert read(tmp_path / "compression.json")["share"] <= 0.6


@pytest.mark.slow
def test_whole_numbers_are_tuned_and_rebuilt(tmp_path):
    tuned = ("--tune=2", "--set", "eval_every=2", "checkpoint_every=2")
    status, _, error = compress(tmp_path, "--method=integer(group=8)", "--budget=0.3", "--where=mlp", *tuned)
    assert (status, error) == (0, "")
    layer = read(tmp_path / "config.json")["structure"]["encoder.blocks.0.mlp.up"]
    assert (layer["name"], layer["group"]) == ("integer", 8)
    assert evaluate_here(f"--workdir={tmp_path}")[0] == 0


def test_errors_are_those_of_outputs_and_few_examples_are_a_line(tmp_path):
    """Of a method without data as well; the training split has 300 examples."""
    run = finished_run()[0]
    status, said, error = compress(tmp_path, "--method=svd", "--budget=0.5", "--where=mlp", "--calibration=999")
    assert (status, error) == (0, "")
    assert "calibration has all 300 training examples, 999 were asked for\n" in said
    _, task, before, step = trained_run(run, "best")
    record, after = read(tmp_path / "compression.json"), trained_run(tmp_path, "best")[2]
    assert (record["step"], record["parameters"]) == (step, checksum(before))
    asked = Asked(run, tmp_path, calibration=300)
    inputs = gather(before, select(before, "mlp"), calibration(task, asked, 8))
    for layer in select(before, "mlp"):
        entry, moment = record["layers"][layer.name], inputs[layer.path].moment
        kernel = kernel_of(layer.module)
        off = kernel - kernel_of(find(after, layer.path))
        left = np.sqrt(np.trace(off.T @ moment @ off) / np.trace(kernel.T @ moment @ kernel))
        assert entry["error"] == pytest.approx(left, rel=1e-3) and abs(left - entry["tail of W"]) > 0.01


def test_a_budget_of_one_changes_no_score(tmp_path):
    status, _, error = compress(tmp_path / "same", "--method=id", "--budget=1")
    assert (status, error) == (0, "")
    whole, same = read(finished_run()[0] / "summary.json"), read(tmp_path / "same" / "summary.json")
    assert same["test_accuracy"] == whole["test_accuracy"] and same["parameters"] == whole["parameters"]


@pytest.mark.slow
def test_a_run_that_starts_from_a_compressed_one_has_its_structure_and_resumes(tmp_path):
    small, on = tmp_path / "small", tmp_path / "on"
    assert compress(small, "--method=svd+eora", "--budget=0.6")[0] == 0
    options = [f"--config.init_from={small}", "--config.steps=20"]
    status, _, error = train_here(on, *options)
    assert (status, error) == (0, "")
    assert read(on / "config.json")["structure"] == read(small / "config.json")["structure"]
    status, out, _ = train_here(on, *options)
    assert status == 0 and "is finished: 20 steps are done" in out
    # It has begun with the compressed parameters: no steps leave them as they are.
    still = tmp_path / "still"
    assert train_here(still, f"--config.init_from={small}", "--config.steps=0")[0] == 0
    for name, array in arrays(small).items():
        if name.startswith("params"):
            np.testing.assert_array_equal(array, arrays(still)[name])
    assert read(still / "summary.json")["test_accuracy"] == read(small / "summary.json")["test_accuracy"]


@pytest.mark.slow
def test_killed_at_any_time_the_same_command_ends_with_the_same_run(tmp_path):
    """Before the compressed model is saved, and while it is tuned."""
    arguments = ["--method=stat", "--budget=0.6", "--tune=30", "--set", "eval_every=10", "--set", "log_every=5"]
    command = ["-m efficient_tx.compress", f"--workdir={finished_run()[0]}", *arguments]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, _, error = finish(start(*command, f"--out={whole}", environment=as_here()))
    assert status == 0, error
    process = start(*command, f"--out={killed}", environment=as_here())
    while not (killed / "compression.json").exists():
        assert process.poll() is None
    process.kill()
    process.communicate()
    process = start(*command, f"--out={killed}", environment=as_here())
    wait_for_step(killed, 10)
    process.kill()
    process.communicate()
    status, _, error = finish(start(*command, f"--out={killed}", environment=as_here()))
    assert status == 0, error
    assert toy.lines(killed) == toy.lines(whole)
    for name, array in arrays(whole, 30).items():
        np.testing.assert_array_equal(array, arrays(killed, 30)[name])
    # SIGTERM saves and says how to go on.
    stopped = tmp_path / "stopped"
    process = start(*command, f"--out={stopped}", environment=as_here())
    wait_for_step(stopped, 5)
    process.send_signal(signal.SIGTERM)
    status, _, error = finish(process)
    assert status == 143 and "the same command goes on: python -m efficient_tx.compress" in error


def test_what_cannot_be_is_one_line_and_writes_nothing(tmp_path, monkeypatch):
    run, out = finished_run()[0], tmp_path / "out"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    changed = "--method=svd", "--budget=0.5", "--set"
    cases = {
        ("--method=svd", "--budget=0"): "--budget=0.0: it must be above 0 and at most 1",
        ("--method=svd", "--budget=2"): "--budget=2.0: it must be above 0 and at most 1",
        ("--method=svd", "--budget=half"): "argument --budget: invalid float value: 'half'",
        ("--method=svdd", "--budget=0.5"): "--method=svdd: choose one of svd",
        ("--method=svd", "--budget=0.001"): "--budget=0.001: svd cannot meet it",
        ("--method=svd", "--budget=0.5", "--where=mpl"): "where='mpl' selects no linear layer",
        ("--method=flap", "--budget=0.5", "--calibration=0"): "--calibration=0: must be at least 1",
        ("--method=svd", "--budget=0.5", "--set", "optimizer.lr=1"): "optimizer.lr",
        (*changed, "steps=3"): "--set=steps=3: config.steps is how long the result is tuned",
        (*changed, "mixers=lev"): "--set=mixers=lev: config.mixers is what the model is given",
        (*changed, f"init_from={run}"): "config.init_from has no effect: the result begins",
        ("--method=sparse(density=2.0)", "--budget=0.5"): "--method=sparse(density=2.0): density is 2.0: it must be",
        ("--method=sum(first='sparse(density=2.0)')", "--budget=0.5"): "sum(first='sparse(density=2.0)'): first is",
        ("--method=svd", "--budget=0.5", "--checkpoint=7"): "has best, last and the steps",
        ("--budget=0.5",): "--method is missing: name one of those that --help shows, or other --mixers",
    }
    for arguments, line in cases.items():
        status, said, error = compress(out, *arguments)
        assert status == 2 and line in error, (arguments, said, error)
        assert error.count("\n") == 1 and "Traceback" not in error
        assert not out.exists()
    status, _, error = compress(out, "--method=svd", "--budget=0.5", run=tmp_path / "none")
    assert status == 2 and "is not the workdir of a run" in error and not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    status, _, error = compress(tmp_path / "full", "--method=svd", "--budget=0.5")
    assert status == 2 and "holds something else" in error
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["notes.txt"]
    file, locked = tmp_path / "full" / "notes.txt", tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked)
    for place, line in {
        file: f"--out={file} is a file: name a folder\n",
        file / "small": f"--out='{file}/small' cannot be a folder: Not a directory\n",
        locked / "small": f"--out={locked}/small cannot be made: {locked} cannot be written\n",
    }.items():
        assert compress(place, "--method=svd", "--budget=0.5") == (2, "", line)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["crc32.json", "compression.json"])
@pytest.mark.slow
def test_killed_while_the_first_files_are_written_the_same_command_goes_on(tmp_path, monkeypatch, file):
    """As such a kill leaves the folder: lock, perhaps the checksums, and the part of a file with its hidden name."""
    out, replace = tmp_path / "small", os.replace

    def killed(part, whole):
        if Path(whole) == out / file:
            shutil.copy(part, f"{part}.left")
            raise KeyboardInterrupt
        replace(part, whole)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        assert compress(out, "--method=svd", "--budget=0.5")[0] == 130
    for part in out.glob(".*.left"):
        part.rename(out / part.stem)
    left = sorted(entry.name for entry in out.iterdir())
    assert any(re.fullmatch(rf"\.{file}\.[0-9a-f]+\.tmp", name) for name in left) and file not in left, left
    assert compress(out, "--method=svd", "--budget=0.5")[::2] == (0, "")
    assert (out / "summary.json").exists()
    assert not any(name.startswith(".") for name in os.listdir(out))


def test_another_call_in_the_same_folder_is_refused_and_the_same_one_is_done(tmp_path):
    out = tmp_path / "small"
    assert compress(out, "--method=svd", "--budget=0.5")[0] == 0
    status, said, error = compress(out, "--method=svd", "--budget=0.5")
    assert (status, error) == (0, "") and "is finished: 0 steps are done" in said
    status, _, error = compress(out, "--method=svd", "--budget=0.4")
    assert status == 2 and "budget was 0.5 there and is 0.4 here" in error
    damaged = shutil.copytree(out, tmp_path / "damaged")
    text = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(text.replace('"low_rank"', '"low_rink"'))
    status, _, error = evaluate_here(f"--workdir={damaged}")
    assert status == 2 and "CRC-32" in error
