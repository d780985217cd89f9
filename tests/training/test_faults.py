"""Faults of real processes: SIGKILL at chosen and at random moments, signals, damage, a full disk."""

import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from efficient_tx.training.checkpoint import Checkpoints
from tests.support import toy
from tests.support.command import (
    SAMPLED,
    TINY,
    as_here,
    finish,
    finished_run,
    start,
    train,
    train_here,
    wait_for_step,
)

ENDLESS = ["--config.steps=1000000", "--config.eval_every=1000000", "--config.checkpoint_every=1000000"]


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """SIGKILL before the first checkpoint, before one is complete, while files change names."""
    toy.make_loop(tmp_path / "straight").run()
    for moment, number in [("save", 1), ("rename", 2), ("replace", 9)]:
        killed = subprocess.run([sys.executable, toy.__file__, tmp_path / "killed", moment, str(number)])
        assert killed.returncode == -signal.SIGKILL
    toy.make_loop(tmp_path / "killed").run()
    assert toy.lines(tmp_path / "killed") == toy.lines(tmp_path / "straight")
    left = [{entry.name for entry in (tmp_path / name / "checkpoints").iterdir()} for name in ("killed", "straight")]
    assert left[0] == left[1]


@pytest.mark.slow
def test_train_killed_and_resumed_ends_with_the_same_lines(tmp_path):
    """A process, which computes what this one does, is killed; what it left, this one ends."""
    finished_run()  # Its data and its compiled programs are there by then.
    run = start("train.py", *TINY, f"--workdir={tmp_path / 'run'}", environment=as_here())
    wait_for_step(tmp_path / "run", 14)
    run.kill()
    assert finish(run)[0] == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "spl')
    status, out, error = train_here(tmp_path / "run")
    assert (status, error) == (0, "") and "resuming from step" in out
    assert toy.lines(tmp_path / "run") == toy.lines(finished_run()[0])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ending"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, number, ending):
    finished_run()  # Its data and its compiled programs are there by then.
    path = tmp_path / "run"
    run = start("train.py", *TINY, *ENDLESS, f"--workdir={path}", environment=as_here())
    wait_for_step(path, 7)
    # Meanwhile nobody else may have the folder.
    status, _, error = train_here(path, *ENDLESS)
    assert status == 2 and error.count("\n") == 1
    assert f"--workdir={path} is in use by a live run (process {run.pid})" in error
    run.send_signal(number)
    status, _, error = finish(run)
    (saved,) = Checkpoints(path / "checkpoints").steps()
    assert status == ending and error.count("\n") == 1 and saved >= 7
    assert error.startswith(f"stopped by {number.name}: step {saved} of 1000000 is saved; the same command goes on: ")
    assert f"--workdir={path}" in error


@pytest.mark.slow
def test_damaged_checkpoints_cost_a_line_each(tmp_path):
    def damaged_copy(name, how):
        """A copy of the finished run without its summary; `how` says per step whether a file is halved (else a bit)."""
        path = tmp_path / name
        shutil.copytree(finished_run()[0], path)
        (path / "summary.json").unlink()
        for step, keep_half in how.items():
            folder = path / "checkpoints" / str(step)
            file = max(folder.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content[: len(content) // 2] if keep_half else content)
        return path

    *oldest, older, newest = Checkpoints(finished_run()[0] / "checkpoints").steps()

    path = damaged_copy("one", {newest: False})
    status, out, error = train_here(path)
    assert (status, error) == (0, "")
    assert f"checkpoints/{newest} is damaged" in out and f"using {older} instead" in out
    assert f"resuming from step {older} of 40" in out
    assert toy.lines(path) == toy.lines(finished_run()[0])

    path = damaged_copy("all", {newest: False, older: True} | dict.fromkeys(oldest, True))
    status, out, error = train_here(path)
    assert f"checkpoints/{newest} is damaged" in out and f"using {older} instead" in out
    assert status == 2 and error.count("\n") == 1 and "is damaged" in error and "no other is left" in error


@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path):
    """In every file of a run; its end, with room again, is below."""
    finished_run()  # Its compiled programs are stored by then: the limit does not hit those first.
    status, _, error = train(tmp_path / "run", file_limit=20_000, environment=as_here())
    assert status == 1 and error.count("\n") == 1
    assert error.startswith(f"cannot write {tmp_path}/run/") and "File too large; the same command goes on" in error


@pytest.mark.slow
def test_killed_at_random(tmp_path):
    """Five processes, each killed within 8 s: while it compiles, trains, saves, evaluates, sums up."""
    generator, settings = random.Random(0), {"data": tmp_path / "data", "environment": as_here()}
    for _ in range(5):
        run = start("train.py", *SAMPLED, f"--workdir={tmp_path / 'run'}", **settings)
        time.sleep(generator.uniform(0, 8))
        run.kill()
        finish(run)
    status, _, error = train(tmp_path / "run", run=SAMPLED, **settings)
    assert status == 0, error
    assert train_here(tmp_path / "straight", run=SAMPLED)[0] == 0
    assert toy.lines(tmp_path / "run") == toy.lines(tmp_path / "straight")


@pytest.mark.slow
def test_killed_while_data_are_generated(tmp_path):
    options = ["--config.task.train_size=60000", "--config.task.max_len=200", "--config.steps=2"]
    for delay in (0.3, 1.5, 3.0):
        run = start(
            "train.py", *TINY, f"--workdir={tmp_path / 'run'}", *options, data=tmp_path / "data", environment=as_here()
        )
        while not any((tmp_path / "data").glob("listops/*")) and run.poll() is None:
            time.sleep(0.02)
        time.sleep(delay)
        run.kill()
        finish(run)
        assert not (tmp_path / "run").exists() or delay == 3.0
    assert train_here(tmp_path / "run", *options, data=tmp_path / "data")[0] == 0
    assert train_here(tmp_path / "straight", *options, data=tmp_path / "other")[0] == 0
    assert toy.lines(tmp_path / "run") == toy.lines(tmp_path / "straight")


@pytest.mark.slow
def test_a_really_full_disk(tmp_path):
    """A file system of 300 kB fills up during the run; with room again, the same command ends as it should."""
    finished_run()  # Its data are there by then.
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        status, _, error = train(disk / "run", "--config.keep=100", environment=as_here())
        assert status == 1 and error.count("\n") == 1 and "No space left on device; the same command goes on" in error
        saved = Checkpoints(disk / "run" / "checkpoints").steps()
        assert saved and saved[-1] < 40
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        status, out, error = train_here(disk / "run", "--config.keep=100")
        assert (status, error) == (0, "") and f"resuming from step {saved[-1]} " in out
        assert toy.lines(disk / "run") == toy.lines(finished_run()[0])
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        status, _, error = train_here(disk / "new")
        assert status == 2 and error.count("\n") == 1 and "cannot be made" in error
    finally:
        subprocess.run(["umount", disk], check=True)


TERMINATED = """
import os, signal, sys
from efficient_tx import train
from efficient_tx.training.loop import Loop
from tests.support import toy

if "--process_id=1" in sys.argv:
    toy.once(Loop, "_advance", 18, lambda: os.kill(os.getpid(), signal.SIGTERM))
train.command()
"""


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(tmp_path):
    """SIGTERM to one of two processes stops both after the same step; what they left, one ends as if alone."""
    path = tmp_path / "run"
    (tmp_path / "terminated.py").write_text(TERMINATED)
    finished_run()  # Its data are there by then.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    runs = [
        start(
            str(tmp_path / "terminated.py"), *TINY, f"--workdir={path}", f"--coordinator_address={address}",
            "--num_processes=2", f"--process_id={index}", environment={"PYTHONPATH": "."},
        )
        for index in range(2)
    ]  # fmt: skip
    results = [finish(run) for run in runs]
    assert [status for status, _, _ in results] == [143, 143], results
    saved = Checkpoints(path / "checkpoints").steps()[-1]
    assert 18 <= saved < 40 and all(f"step {saved} of 40 is saved" in error for _, _, error in results)
    status, out, error = train_here(path)
    assert (status, error) == (0, "") and f"resuming from step {saved} of 40" in out
    for line, alone in zip(toy.lines(path), toy.lines(finished_run()[0]), strict=True):
        # The sums over two devices are added in another order, and the updates carry the difference on.
        assert line.pop("split") == alone.pop("split") and line == pytest.approx(alone, rel=1e-3)
