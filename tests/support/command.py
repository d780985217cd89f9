"""train.py and eval.py on a run that takes seconds: here in this process, or as processes of their own."""

import atexit
import contextlib
import functools
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from unittest import mock

import jax
from absl.testing import flagsaver

import efficient_tx.compress.__main__
import efficient_tx.eval
import efficient_tx.inspect.__main__
import efficient_tx.predict.__main__
import efficient_tx.train
from efficient_tx import commands
from tests.support import ROOT, toy

TINY = shlex.split(
    "--config=quickstart:softmax --config.steps=40 --config.batch_size=8 --config.grad_accum=1 --config.eval_every=10 "
    "--config.log_every=7 --config.checkpoint_every=15 --config.task.train_size=300 --config.task.val_size=50 "
    "--config.task.test_size=50 --config.task.min_len=4 --config.task.max_len=24 --config.model.features=16 "
    "--config.model.mlp_features=32 --config.model.layers=1 --config.model.heads=2 "
    "--config.model.dropout=0.1"
)
# The same run with a mixer that draws at random.
SAMPLED = [*TINY, "--config.mixers=skyformer", "--config.attention.skyformer.landmarks=8"]

Result = tuple[int, str, str]  # exit status, standard output, standard error


@functools.cache
def scratch() -> Path:
    """A folder for data, compiled programs and the shared runs, gone when the tests end."""
    path = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    if jax.config.jax_compilation_cache_dir:  # conftest.py's: programs of earlier tests are found
        (path / "data").mkdir()
        (path / "data" / "compilation").symlink_to(jax.config.jax_compilation_cache_dir)
    return path


def start(
    script: str,
    *arguments: object,
    data: Path | None = None,
    devices: int | None = None,
    file_limit: int | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path = ROOT,
    optimised: bool = False,
) -> subprocess.Popen:
    """A process of "train.py", or of a module, "-m efficient_tx.train", in `folder`.

    Data and compiled programs lie in `data` (None = shared by all tests). No file that it writes may get longer than
    `file_limit` bytes: what a full disk does to it, without root's help. Programs are optimised as users have them, or
    compiled as conftest.py has it: in a third of the time, and found where another test has compiled them. It has
    `devices`, or those that a user's process has.
    """
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    settings |= {"EFFICIENT_TX_DATA": str(data or scratch() / "data")}
    settings |= {"JAX_NUM_CPU_DEVICES": str(devices)} if devices else {}
    if not optimised:
        settings |= {"XLA_FLAGS": os.environ["XLA_FLAGS"], "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}
    settings |= environment or {}
    limited = ["prlimit", f"--fsize={file_limit}"] if file_limit else []
    command = [*limited, sys.executable, *script.split(), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=settings, stdout=pipe, stderr=pipe, text=True)


def as_here() -> dict[str, str]:
    """The environment in which a process computes what this one does, bit for bit."""
    return {"JAX_NUM_CPU_DEVICES": str(len(jax.local_devices()))}


def finish(process: subprocess.Popen) -> Result:
    """What the process says, when it has ended."""
    out, error = process.communicate(timeout=500)
    return process.returncode, out, error


def train(workdir: Path, *options: object, run: Sequence[str] = TINY, **settings) -> Result:
    """Runs train.py on the tiny run to its end, in a process."""
    return finish(start("train.py", *run, f"--workdir={workdir}", *options, **settings))


def evaluate(*arguments: object, **settings) -> Result:
    """Runs eval.py to its end, in a process."""
    return finish(start("eval.py", *arguments, **settings))


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Takes back what a command changes in the process that it runs in."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    kept = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_debug_nans"
    settings = {name: getattr(jax.config, name) for name in kept}
    show, path = warnings.showwarning, [*sys.path]
    try:
        # A process that is a command's own ends with it.
        with flagsaver.flagsaver(), mock.patch.object(commands, "_own_process", False):
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in settings.items():
            jax.config.update(name, value)
        warnings.showwarning, sys.path[:] = show, path


def here(command: Callable[[], None], *arguments: object, data: Path | None = None) -> Result:
    """Runs a command in this process, with its four devices: a second instead of eight."""
    out, error = io.StringIO(), io.StringIO()
    with (
        undone(),
        mock.patch.object(sys, "argv", ["command", *map(str, arguments)]),
        mock.patch.dict(os.environ, {"EFFICIENT_TX_DATA": str(data or scratch() / "data")}),
        # The programs stay where conftest.py keeps them.
        mock.patch("efficient_tx.train.keep_programs"),
        mock.patch("efficient_tx.eval.keep_programs"),
        mock.patch("efficient_tx.compress.pipeline.keep_programs"),
        mock.patch("efficient_tx.predict.__main__.keep_programs"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
    ):
        try:
            command()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), error.getvalue()


def train_here(workdir: Path, *options: object, run: Sequence[str] = TINY, **settings) -> Result:
    """Runs train.py on the tiny run to its end, in this process."""
    return here(efficient_tx.train.command, *run, f"--workdir={workdir}", *options, **settings)


def evaluate_here(*arguments: object, **settings) -> Result:
    """Runs eval.py to its end, in this process."""
    return here(efficient_tx.eval.command, *arguments, **settings)


def compress_here(*arguments: object, **settings) -> Result:
    """Runs compress.py to its end, in this process."""
    return here(efficient_tx.compress.__main__.command, *arguments, **settings)


def inspect_here(*arguments: object, **settings) -> Result:
    """Runs the command that looks inside a run to its end, in this process."""
    return here(efficient_tx.inspect.__main__.command, *arguments, **settings)


@functools.cache
def finished_run() -> tuple[Path, str]:
    """Workdir and output of a tiny run of this process. Read it, or copy it: all tests share it."""
    path = scratch() / "here"
    status, out, error = train_here(path)
    assert status == 0, error
    return path, out


def wait_for_step(path: Path, step: int) -> None:
    """Returns once metrics.jsonl has a line of `step`."""
    deadline = time.monotonic() + 600
    while not any(line["step"] >= step for line in toy.lines(path)):
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)
