"""The command: what it prints, refuses, and does after a kill."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest

from efficient_tx.config.stored import workdir_of
from efficient_tx.sweep.__main__ import Sweep, command, parse
from tests.support import toy
from tests.support.command import TINY, finish, here, start, train

RUN = [argument for argument in TINY if argument.startswith("--config.")]
SWEEP = "-m efficient_tx.sweep"
TWO = ["--config=quickstart", "--mixers=softmax,vmean", *RUN]


def sweep_here(*arguments):
    return here(command, *arguments)


def test_a_dry_run_prints_the_commands_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    status, printed, error = sweep_here(*TWO, "--seeds=2", f"--out={out}", "--dry_run")
    assert (status, error) == (0, "") and not out.exists()
    lines = printed.splitlines()
    assert len(lines) == 4 and lines[0].startswith("python -m efficient_tx.train --config=quickstart:softmax+dense ")
    assert lines[3].endswith("--config.seed=1") and f"--workdir={out}/vmean_seed1 " in lines[3]
    status, printed, _ = sweep_here(*TWO, "--tune", "optimizer.b2=0.9,0.99", f"--out={out}", "--dry_run")
    assert printed.count("_tune_seed0") == 4 and "# vmean: then 1 with the best of 2 settings" in printed


def test_a_setting_of_some_methods_is_said_to_be_that(tmp_path):
    setting = ["--mixers=softmax,skyformer", "--set", "attention.skyformer.landmarks=4,8"]
    status, printed, error = sweep_here(*TWO[:1], *setting, *RUN, f"--out={tmp_path}", "--dry_run")
    assert (status, len(printed.splitlines())) == (0, 3)
    assert error == "attention.skyformer.landmarks is set where it is a key: not in softmax\n"


def test_the_script_for_slurm(tmp_path):
    status, printed, error = sweep_here(*TWO, f"--out={tmp_path}", "--slurm")
    assert (status, error) == (0, "") and f"sbatch {tmp_path}/sweep.slurm" in printed
    assert "#SBATCH --array=0-1\n" in (tmp_path / "sweep.slurm").read_text()
    assert subprocess.run(["bash", "-n", tmp_path / "sweep.slurm"]).returncode == 0
    assert set(json.loads((tmp_path / "sweep.json").read_text())["runs"]) == {"softmax_seed0", "vmean_seed0"}


def leave(run, score):
    """Puts into a run's workdir what it leaves when it has ended; None is the score of one that diverged."""
    workdir = workdir_of(run.workdir, run.config, typed=run.typed)
    workdir.begin()
    if score is None:
        workdir.diverge("the loss or the gradient of step 2 is not finite")
    else:
        workdir.finish({"best_step": 40, "val_accuracy": score, "test_accuracy": score, "baselines": {}})
    workdir.release()


def test_a_run_that_diverged_is_out_of_the_scripts_for_slurm(tmp_path):
    """Tuning, then what it chose, then nothing: each is written once."""
    arguments = [TWO[0], "--mixers=vmean", *RUN, "--tune", "optimizer.learning_rate=1e30,1e-2", f"--out={tmp_path}"]
    wild, tame = Sweep(*parse(arguments)).tuning
    _, printed, _ = sweep_here(*arguments, "--slurm")
    assert "an array of 2 runs" in printed and "1 more runs follow" in printed
    leave(wild, None)
    leave(tame, 0.5)
    status, printed, error = sweep_here(*arguments, "--slurm")
    assert status == 0 and "an array of 1 runs" in printed and "follow" not in printed
    assert error == f"not finite: {wild.name}; it is not run again unless {wild.workdir} is deleted\n"
    assert f"--workdir={tmp_path}/vmean_learning_rate=1e-2_seed1 " in (tmp_path / "sweep.slurm").read_text()
    sweep = Sweep(*parse(arguments))
    sweep.choose({wild.name: None, tame.name: {"val_accuracy": 0.5}})
    leave(sweep.runs[-1], 0.5)
    script = (tmp_path / "sweep.slurm").stat().st_mtime_ns
    status, printed, _ = sweep_here(*arguments, "--slurm")
    assert (status, printed) == (0, f"2 of 3 runs are finished in {tmp_path}, and none is left\n")
    assert (tmp_path / "sweep.slurm").stat().st_mtime_ns == script


def test_a_tuning_in_which_all_diverged_chooses_nothing(tmp_path):
    """Neither a script for SLURM nor a sweep runs anything again: both say so at once."""
    arguments = [TWO[0], "--mixers=vmean", *RUN, "--tune", "optimizer.learning_rate=1e30,1e35", f"--out={tmp_path}"]
    for run in Sweep(*parse(arguments)).tuning:
        leave(run, None)
    for more in (["--slurm"], []):
        status, printed, error = sweep_here(*arguments, *more)
        assert status == 1 and "0 of " in printed and "started" not in printed
        assert "nothing was chosen for vmean, as its tuning failed: it is not run\n" in error
    assert error.count("out of the tuning: ") == 2 and "all it said" not in error  # there is no log


def test_a_damaged_record_is_refused_and_stays(tmp_path):
    (tmp_path / "sweep.json").write_text("{")
    for more in ([], ["--slurm"]):
        status, printed, error = sweep_here(*TWO, f"--out={tmp_path}", *more)
        assert (status, printed, error.count("\n")) == (2, "", 1) and "sweep.json is damaged" in error
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    assert (tmp_path / "sweep.json").read_text() == "{"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--mixers=softmax,softmax"], "softmax+dense and softmax+dense have equal configs"),
        (["--mixers=softmax", "--set", "steps"], "argument --set: 'steps' is no KEY=VALUES"),
        (["--mixers=softmax", "--set", "steps=1", "steps=2"], "--set steps is given twice"),
        (["--mixers=softmax", "--set", "step=1"], "step=1: config.step is no key: the nearest is steps"),
        (["--mixers=softmax", "--config.step=1"], "config.step is no key: the nearest is steps"),
        (["--mixers=softmax", "--config.mixers=vmean"], "config.mixers is set by --mixers: leave it out"),
        (["--config.seed=7", "--seeds=2"], "config.seed is set by --seeds of a sweep"),
        (["--mixers=softmx"], "config.mixers is 'softmx'"),
        (["--mixers=,"], "argument --mixers: it is empty"),
        (["--mixer=softmax"], "--mixer=softmax is no flag: the nearest is --mixers"),
        (["--seeds=0"], "argument --seeds: '0' is no whole number"),
        (["--dry_run", "--slurm"], "--dry_run and --slurm"),
        (["--until=9", "--tune", "steps=10,20"], "--until is for runs without --tune"),
        (["--config=quickstart:gla", "--mixers=softmax"], "--config=quickstart:gla: what follows the colon"),
        (["--config=quickstrt"], "--config=quickstrt: there is no such config file; the nearest is quickstart"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, arguments, line):
    status, out, error = sweep_here("--config=quickstart", *arguments, f"--out={tmp_path / 'out'}")
    assert (status, out, error.count("\n")) == (2, "", 1) and line in error, error
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    """The runs there have the same names and other settings."""
    (tmp_path / "vmean_seed0").mkdir()
    (tmp_path / "vmean_seed0" / "config.json").write_text("{}")
    status, out, error = sweep_here(*TWO, f"--out={tmp_path}")
    assert (status, out, error.count("\n")) == (
        2,
        "",
        1,
    ) and "vmean_seed0 belongs to a run with another config" in error


def until(found, process):
    deadline = time.monotonic() + 300
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def ended(workdir):
    """Whether no process holds the workdir."""
    return subprocess.run(["flock", "--nonblock", workdir / "lock", "true"]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_started_again_it_ends_as_if_nothing_had_been(tmp_path, number):
    """Its runs end with it; those that were finished are not run again."""
    out, arguments = tmp_path / "out", [*TWO, f"--out={tmp_path / 'out'}"]
    first = start(SWEEP, *arguments)
    running = out / "vmean_seed0"
    until(lambda: toy.lines(running)[-1:] and toy.lines(running)[-1]["step"] >= 10, first)
    first.send_signal(number)
    _, printed, error = finish(first)
    if number != signal.SIGKILL:
        line = f"stopped by {number.name}; the same command goes on: python -m efficient_tx.sweep "
        assert first.returncode == 128 + number and error.startswith(line)
        assert ended(running)
    deadline = time.monotonic() + 60
    while not ended(running):
        assert time.monotonic() < deadline, "the run outlives its sweep"
        time.sleep(0.05)
    assert not (running / "summary.json").exists(), "it was killed too late to tell"
    before = os.stat(out / "softmax_seed0" / "summary.json").st_mtime_ns

    status, printed, error = finish(start(SWEEP, *arguments))
    assert (status, error) == (0, "") and f"2 of 2 runs are finished in {out}\n" in printed
    assert "started vmean_seed0" in printed and "started softmax_seed0" not in printed
    assert os.stat(out / "softmax_seed0" / "summary.json").st_mtime_ns == before
    status, _, error = train(tmp_path / "alone", "--config.mixers=vmean", *RUN)
    assert status == 0, error
    assert toy.lines(running) == toy.lines(tmp_path / "alone")


@pytest.mark.slow
def test_a_failed_run_is_reported_and_stops_no_other(tmp_path):
    """And a second sweep waits for a workdir that a run holds, then goes on in it."""
    arguments = [*TWO, "--set", "optimizer.learning_rate=1e-3,1e30", f"--out={tmp_path}", "--jobs=2"]
    first = start(SWEEP, *arguments)
    until(lambda: (tmp_path / "softmax_learning_rate=1e-3_seed0" / "lock").exists(), first)
    second = start(SWEEP, *arguments)
    for status, out, error in (finish(first), finish(second)):
        assert status == 1 and "2 of 4 runs are finished" in out
        assert error.count("failed: ") == 2 and error.count(" is not finite") >= 2
        assert "failed: vmean_learning_rate=1e30_seed0 (not finite); all it said is in " in error
    assert "waiting for " in out


@pytest.mark.slow
def test_runs_pause_where_they_are_asked_to(tmp_path):
    """All come to a step before any goes on; the same command then has nothing to do, a later step has."""
    longer = [argument for argument in RUN if not argument.startswith(("--config.steps", "--config.log_every"))]
    arguments = [*TWO[:2], *longer, "--config.steps=20000", "--config.log_every=10", f"--out={tmp_path}", "--until=20"]
    status, out, error = finish(start(SWEEP, *arguments))
    assert (status, error) == (0, "") and "0 of 2 runs are finished in" in out and "2 have come to step 20" in out
    runs = [tmp_path / f"{mixer}_seed0" for mixer in ("softmax", "vmean")]
    steps = [toy.lines(run)[-1]["step"] for run in runs]
    assert all(20 <= step < 20000 for step in steps)
    status, out, _ = finish(start(SWEEP, *arguments))
    assert status == 0 and "started" not in out and [toy.lines(run)[-1]["step"] for run in runs] == steps
    further = max(steps) + 10
    status, out, _ = finish(start(SWEEP, *arguments[:-1], f"--until={further}"))
    assert status == 0 and out.count("paused ") == 2
    assert all(toy.lines(run)[-1]["step"] >= further for run in runs)


@pytest.mark.slow
def test_tuning_chooses_and_fresh_seeds_run(tmp_path):
    arguments = [*TWO[:1], "--mixers=vmean", *RUN, "--tune", "optimizer.learning_rate=1e30,1e-2"]
    arguments += ["--seeds=2", f"--out={tmp_path}", "--jobs=2"]
    status, out, error = finish(start(SWEEP, *arguments))
    assert status == 0 and error.count("out of the tuning: ") == 1, error
    assert out.count("chosen on validation") == 1
    stored = json.loads((tmp_path / "sweep.json").read_text())
    assert {one["settings"]["optimizer.learning_rate"] for one in stored["chosen"].values()} == {"1e-2"}
    seeds = [run["seed"] for run in stored["runs"].values() if run["purpose"] == "run"]
    assert sorted(seeds) == [1, 2]
    shutil.rmtree(tmp_path / "vmean_learning_rate=1e-2_seed2")
    status, out, error = finish(start(SWEEP, *arguments))
    assert status == 0 and "started vmean_learning_rate=1e-2_seed2" in out and "3 of 4 runs are finished" in out
    assert "started vmean_learning_rate=1e30" not in out and error.count("out of the tuning: ") == 1
