"""train.py and eval.py as processes, on a run that takes seconds."""

import atexit
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support import ROOT, toy

TINY = shlex.split(
    "--config=configs/quickstart.py --config.steps=40 --config.batch_size=8 --config.eval_every=10 "
    "--config.log_every=7 --config.checkpoint_every=15 --config.task.train_size=300 --config.task.val_size=50 "
    "--config.task.test_size=50 --config.task.min_len=4 --config.task.max_len=24 --config.model.features=16 "
    "--config.model.mlp_features=32 --config.model.layers=1 --config.model.heads=2 "
    "--config.attention.skyformer.landmarks=8 --config.model.dropout=0.1"
)


@functools.cache
def scratch() -> Path:
    """A folder for data, compiled programs and the shared run, gone when the tests end."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def start(
    script: str,
    *arguments: object,
    data: Path | None = None,
    devices: int = 1,
    file_limit: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen:
    """A process; data and compiled programs lie in `data` (None = shared by all tests).

    No file that it writes may get longer than `file_limit` bytes: what a full disk does to it, without root's help.
    """
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    settings |= {"EFFICIENT_TX_DATA": str(data or scratch() / "data"), "JAX_NUM_CPU_DEVICES": str(devices)}
    settings |= environment or {}
    limited = ["prlimit", f"--fsize={file_limit}"] if file_limit else []
    command = [*limited, sys.executable, script, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=settings, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """(exit status, standard output, standard error), when the process has ended."""
    out, error = process.communicate(timeout=500)
    return process.returncode, out, error


def train(workdir: Path, *options: object, **settings) -> tuple[int, str, str]:
    """Runs train.py on the tiny run to its end."""
    return finish(start("train.py", *TINY, f"--workdir={workdir}", *options, **settings))


def evaluate(*arguments: object, **settings) -> tuple[int, str, str]:
    """Runs eval.py to its end."""
    return finish(start("eval.py", *arguments, **settings))


@functools.cache
def finished_run() -> tuple[Path, str]:
    """Workdir and output of a tiny run that nothing disturbed. Read it, or copy it: all tests share it."""
    path = scratch() / "run"
    status, out, error = train(path)
    assert status == 0, error
    return path, out


def wait_for_step(path: Path, step: int) -> None:
    """Returns once metrics.jsonl has a line of `step`."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in toy.lines(path)):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)
