"""train.py: what a run leaves behind, what it refuses, and that nothing is written where it does."""

import json
import os
import re
import shutil

import pytest

from efficient_tx.config import make_config
from efficient_tx.config.flags import invoked
from efficient_tx.training.checkpoint import Checkpoints
from efficient_tx.training.devices import sharing
from efficient_tx.training.history import read_lines
from tests.support import toy
from tests.support.command import TINY, as_here, finish, finished_run, start, train, train_here


def read(path):
    return json.loads(path.read_text())


def test_a_run_leaves_what_it_promises():
    path, out = finished_run()
    names = {entry.name for entry in path.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "curve.png", "summary.json"} <= names
    assert any(name.startswith("events.out.tfevents.") for name in names)
    assert (path / "curve.png").read_bytes().startswith(b"\x89PNG")
    config = read(path / "config.json")
    assert (config["steps"], config["mixers"], config["model"]["features"]) == (40, "softmax", 16)
    due = [(step, "train") for step in (7, 14, 21, 28, 35, 40)] + [(step, "validation") for step in (10, 20, 30, 40)]
    assert [(line["step"], line["split"]) for line in toy.lines(path)] == sorted(due)
    assert "test accuracy" in out
    assert f"evaluate it: {' '.join(invoked('eval'))} --workdir={path}" in out


def test_the_summary_agrees_with_the_lines():
    path, out = finished_run()
    summary = read(path / "summary.json")
    assert set(summary) == {
        "task", "source", "best_step", "val_accuracy", "test_accuracy", "last_test_accuracy", "higher_is_better",
        "baselines", "parameters", "steps_per_second", "compile_seconds", "peak_memory_bytes", "peak_memory_of",
        "protocol", "protocol_departures", "versions", "commit", "device",
    }  # fmt: skip
    assert (summary["task"], summary["source"]) == ("listops", "generated, seed 0")
    validation = {line["step"]: line["accuracy"] for line in toy.lines(path) if line["split"] == "validation"}
    assert summary["val_accuracy"] == max(validation.values()) == validation[summary["best_step"]]
    assert summary["best_step"] in Checkpoints(path / "checkpoints").steps()
    assert set(summary["baselines"]) == {"constant", "root operator"}
    for name, accuracy in summary["baselines"].items():
        assert f"{name} {accuracy:.4f}" in out
    assert f"test accuracy {summary['test_accuracy']:.4f}" in out
    trained = [line for line in read_lines(path / "metrics.jsonl") if line["split"] == "train"]
    # 39 steps are timed, the first one compiles.
    assert summary["steps_per_second"] == pytest.approx(39 / sum(line["seconds"] for line in trained))
    assert summary["compile_seconds"] > 0 and summary["peak_memory_bytes"] > 10**8
    assert {"steps", "batch_size", "model.features", "task.train_size"} <= set(summary["protocol_departures"])
    assert not {"seed", "log_every"} & set(summary["protocol_departures"])
    assert summary["device"] == {"platform": "cpu", "kind": "cpu", "count": 4, "processes": 1}


def test_a_finished_run_says_so_and_touches_nothing(tmp_path):
    """Nor does it need the data: there are none here, and none are generated."""
    path, _ = finished_run()
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    status, out, error = train_here(path, data=tmp_path)
    assert (status, error) == (0, "")
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]
    assert out.startswith(f"{path} is finished: 40 steps are done\ntest accuracy ")
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before


def test_a_damaged_config_that_reads_as_this_runs_is_written_again(tmp_path):
    path = shutil.copytree(finished_run()[0], tmp_path / "run")
    file = path / "config.json"
    intact = file.read_bytes()
    file.write_bytes(intact + b" ")
    status, out, error = train_here(path)
    assert (status, error) == (0, "") and "It reads as the config of this run" in out and "is finished" in out
    file.write_bytes(intact.replace(b'"seed": 0', b'"seed": 1'))
    status, _, error = train_here(path)
    assert status == 2 and "config.json is damaged (its CRC-32 differs from that in crc32.json)" in error


def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(tmp_path):
    path, _ = finished_run()
    data = tmp_path / "data"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "config.json").write_text(make_config("efficient_tx.data.vision").to_json())
    cases = [
        (path, ["--config.steps=50"], {}, f"--workdir={path} belongs to a run with another config: steps is 40 there"),
        (tmp_path / "a", ["--config.task.source=/nowhere"], {"data": data}, "/nowhere"),
        (
            tmp_path / "b",
            ["--config.batch_size=6"],
            {"data": data},
            "batch_size=6 cannot be shared out over devices=4",
        ),
        (
            tmp_path / "d",
            [f"--config.init_from={path}", "--config.model.mlp_features=48"],
            {},
            f"--config.init_from={path}: ",
        ),
        (
            tmp_path / "e",
            [f"--config.init_from={tmp_path / 'images'}"],
            {},
            "its task efficient_tx.data.vision is of kind 'image', and this one of 'tokens'",
        ),
        (tmp_path / "f", ["steps=50"], {"data": data}, "'steps=50' is no flag"),
        (
            tmp_path / "g",
            ["--num_processes=2"],
            {"data": data},
            "--num_processes=2: a run over several processes needs coordinator_address and process_id too",
        ),
    ]
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()}
    for workdir, options, settings, wanted in cases:
        status, _, error = train_here(workdir, *options, **settings)
        assert status == 2 and error.count("\n") == 1 and wanted in error, error
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*") if file.is_file()} == before
    shutil.rmtree(tmp_path / "images")
    assert [entry.name for entry in tmp_path.rglob("*") if "compilation" not in entry.parts] in ([], ["data"])


def test_a_run_that_diverges_leaves_a_note(tmp_path):
    """For whoever carries out many: it would diverge again."""
    wild = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup=0", "--config.optimizer.clip=0"]
    status, _, error = train_here(tmp_path / "run", *wild)
    assert status == 3 and error.count("\n") == 1 and " is not finite. " in error
    assert read(tmp_path / "run" / "diverged.json") == {"reason": error.strip()}
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_that_has_ended_can_be_extended(tmp_path):
    """Its lines so far stay, the learning rate goes on as that of the longer run, and the summary says so."""
    path = shutil.copytree(finished_run()[0], tmp_path / "run")
    before = toy.lines(path)
    status, _, error = train_here(path, "--config.steps=50")
    assert status == 2 and "steps is 40 there and 50 here. " in error
    assert "or extend it to 50 steps: python -m efficient_tx.train --extend\n" in error
    status, out, error = train_here(path, "--config.steps=50", "--extend", "--config.batch_size=4")
    assert status == 2 and "batch_size is 8 there and 4 here" in error
    status, out, error = train_here(path, "--config.steps=30", "--extend")
    assert status == 2 and read(path / "config.json")["steps"] == 40 and (path / "summary.json").exists()
    status, out, error = train_here(path, "--config.steps=50", "--extend")
    assert (status, error) == (0, "") and "extended from 40 to 50 steps: after a learning rate of " in out
    assert "resuming from step 40 of 50" in out
    lines = toy.lines(path)
    assert lines[: len(before)] == before
    assert [(line["step"], line["split"]) for line in lines[len(before) :]] == [
        (42, "train"), (49, "train"), (50, "train"), (50, "validation"),
    ]  # fmt: skip
    assert read(path / "summary.json")["extended_from"] == [40] and read(path / "config.json")["steps"] == 50
    rates = {line["step"]: line["learning_rate"] for line in lines if line["split"] == "train"}
    assert rates[42] > rates[40]
    status, out, error = train_here(path, "--config.steps=50")
    assert (status, error) == (0, "") and "is finished: 50 steps are done" in out


@pytest.mark.slow
def test_a_run_can_start_from_the_parameters_of_another(tmp_path):
    """Nothing is learnt in between, so the accuracy is the other run's best, to the last item."""
    other = shutil.copytree(finished_run()[0], tmp_path / "other")
    source = read(other / "summary.json")
    still = ["--config.optimizer.learning_rate=0.0", "--config.steps=1", f"--config.init_from={other}"]
    status, _, error = train_here(tmp_path / "run", *still)
    assert (status, error) == (0, "")
    result = read(tmp_path / "run" / "summary.json")
    assert result["val_accuracy"] == source["val_accuracy"] and result["test_accuracy"] == source["test_accuracy"]
    # Once it has a checkpoint of its own, it goes on without the other run.
    shutil.rmtree(other)
    (tmp_path / "run" / "summary.json").unlink()
    status, out, error = train_here(tmp_path / "run", *still)
    assert (status, error) == (0, "") and "resuming from step 1 of 1" in out
    assert read(tmp_path / "run" / "summary.json")["test_accuracy"] == source["test_accuracy"]


@pytest.mark.slow
def test_a_run_can_start_from_the_projected_layers_of_another(tmp_path):
    """At full rank the projection is exact, so the accuracy is again the other run's; at a lower one it is not."""
    other = finished_run()[0]
    source = read(other / "summary.json")
    still = ["--config.optimizer.learning_rate=0.0", "--config.steps=1", "--config.linear.mlp.name=low_rank"]
    still += [f"--config.init_from={other}"]
    status, out, error = train_here(tmp_path / "low", *still, "--config.linear.mlp.rank=1")
    assert (status, error) == (0, "")
    assert f"parameters of {other}, step {source['best_step']}, its best on validation\n" in out
    errors = re.findall(r"(encoder.blocks.0.mlp.\w+|all 2) projected.*, relative error (0.\d{4})\n", out)
    assert [name for name, _ in errors] == ["encoder.blocks.0.mlp.down", "encoder.blocks.0.mlp.up", "all 2"]
    assert min(float(error) for _, error in errors) > 0.1
    status, out, error = train_here(tmp_path / "exact", *still, "--config.linear.mlp.rank=16")
    assert (status, error) == (0, "") and out.count("relative error 0.0000") == 3
    result = read(tmp_path / "exact" / "summary.json")
    assert result["val_accuracy"] == source["val_accuracy"] and result["test_accuracy"] == source["test_accuracy"]


# Asked to, jax tells of every program that it has to compile.
TELL = {"JAX_EXPLAIN_CACHE_MISSES": "1"}


@pytest.mark.slow
def test_the_same_run_again_compiles_nothing_and_gets_the_same_numbers(tmp_path):
    """With optimised programs, as users have them, and cores that share the examples."""
    finished_run()  # its data are there
    status, _, error = train(tmp_path / "run", optimised=True)
    assert (status, error) == (0, "")
    config, summary = (read(tmp_path / "run" / f"{name}.json") for name in ("config", "summary"))
    assert summary["device"]["count"] == sharing(config["batch_size"], summary["parameters"])
    status, _, error = train(tmp_path / "again", optimised=True, environment=TELL)
    assert status == 0 and "TRACING CACHE MISS" in error and "PERSISTENT COMPILATION CACHE MISS" not in error
    assert toy.lines(tmp_path / "run") == toy.lines(tmp_path / "again")


KEPT = """
import sys
from pathlib import Path
from efficient_tx.training.compilation import keep_programs
from tests.support import toy

keep_programs(Path(sys.argv[1]))
toy.make_loop(Path(sys.argv[2])).run()
"""


@pytest.mark.slow
def test_damaged_programs_are_compiled_again_and_stored(tmp_path):
    """As a process leaves them that is killed while it writes; one damaged program takes its namesakes with it."""
    (tmp_path / "kept.py").write_text(KEPT)

    def run(name, environment):
        command = tmp_path / "programs", tmp_path / name
        process = start(str(tmp_path / "kept.py"), *command, environment={"PYTHONPATH": ".", **environment})
        status, _, error = finish(process)
        assert status == 0, error
        return error

    assert "PERSISTENT COMPILATION CACHE MISS" in run("first", TELL)
    for file in (tmp_path / "programs").iterdir():
        os.truncate(file, file.stat().st_size // 2)
    for name in ("second", "third"):
        assert run(name, {}) == ""
        assert toy.lines(tmp_path / name) == toy.lines(tmp_path / "first")
    assert "PERSISTENT COMPILATION CACHE MISS" not in run("fourth", TELL)


@pytest.mark.slow
def test_more_cpu_devices_than_cores(tmp_path):
    """Every mixer that solves or factorises, in one model: four devices on two threads."""
    several = ["--config.mixers=skyformer,soft,lev,skeinformer,performer", "--config.model.layers=5"]
    several += ["--config.steps=6", "--config.eval_every=6", "--config.log_every=1"]
    status, _, error = train(tmp_path / "run", *several, environment={**as_here(), "NPROC": "2"})
    assert status == 0, error
    assert len(toy.lines(tmp_path / "run")) == 7


@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_goes_on(tmp_path):
    """As after `| head`; it is the run that it would have been."""
    same, _ = finished_run()
    run = start("train.py", *TINY, f"--workdir={tmp_path / 'run'}", environment=as_here())
    run.stdout.close()
    error = run.stderr.read()
    assert (run.wait(), error) == (0, "standard output: Broken pipe; what follows is not shown\n")
    assert toy.lines(tmp_path / "run") == toy.lines(same)
    assert (tmp_path / "run" / "summary.json").exists()
