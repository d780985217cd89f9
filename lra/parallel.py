"""Data made in parallel processes: chunks in order, a progress bar, and no process left behind."""

import contextlib
import importlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_MOST_WORKERS = 16
_SECONDS_BETWEEN_LINES = 5.0


def chunks(function: str, settings: dict[str, Any], workers: int | None = None) -> Iterator[Any]:
    """Yields f(0, **settings), f(1, **settings), ... without end, in this order for any number of workers.

    The workers are fresh interpreters that import f's module only. So no process with threads (jax) is forked, and a
    script without a `__main__` guard does not run twice. The workers end with the generator, and also if the caller is
    killed. Chunk 0 is computed in this process, so a small data set starts no other.

    Args:
      function: "module:name" of f. The module should import fast, and f's results must pickle.
      settings: keyword arguments of f.
      workers: number of processes, default one per available core; 1 starts none.

    Raises:
      ChildProcessError: a worker ended by itself; its messages are on stderr.
    """
    workers = min(available_cores(), _MOST_WORKERS) if workers is None else workers
    f = _resolve(function)
    yield f(0, **settings)
    if workers == 1:
        for index in itertools.count(1):
            yield f(index, **settings)
    processes = []
    try:
        for first in range(1, 1 + workers):
            processes.append(_start(function, settings, range(first, sys.maxsize, workers)))
        for process in itertools.cycle(processes):
            try:
                yield pickle.load(process.stdout)
            except (EOFError, pickle.UnpicklingError):
                raise ChildProcessError(
                    f"a process computing {function} ended with exit code {process.wait()}"
                ) from None
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
            process.stdout.close()


def collect(function: str, settings: dict[str, Any], count: int, title: str) -> dict[str, np.ndarray]:
    """The first `count` rows of the arrays in a function's chunks, by name, with a progress bar.

    Raises:
      ValueError: a chunk is a string, the message of an error.
    """
    arrays: dict[str, np.ndarray] = {}
    done = 0
    with progress(title, count) as advance, contextlib.closing(chunks(function, settings)) as stream:
        for chunk in stream:
            if isinstance(chunk, str):
                raise ValueError(chunk)
            for name, values in chunk.items():
                part = values[: count - done]
                array = arrays.setdefault(name, np.empty((count, *values.shape[1:]), values.dtype))
                array[done : done + len(part)] = part
            done += len(part)
            advance(done)
            if done == count:
                return arrays


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _resolve(function: str) -> Callable[..., Any]:
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)


def _start(function: str, settings: dict[str, Any], indices: range) -> subprocess.Popen:
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", "from lra.parallel import _work; _work()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    with contextlib.suppress(BrokenPipeError), process.stdin as pipe:  # a worker that died is reported when it is read
        pickle.dump((function, settings, indices), pipe)
    return process


def _work() -> None:
    """Runs in a worker and writes its chunks to stdout. A full pipe makes it wait, a closed one ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    function, settings, indices = pickle.load(sys.stdin.buffer)
    with os.fdopen(os.dup(1), "wb") as pipe:
        os.dup2(2, 1)  # nothing that f prints may get between the pickles
        f = _resolve(function)
        for index in indices:
            pickle.dump(f(index, **settings), pipe, protocol=pickle.HIGHEST_PROTOCOL)
            pipe.flush()


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function to call with the count reached. It moves a bar on a terminal, else prints lines on stderr."""
    if not sys.stderr.isatty():
        start = said = time.monotonic()
        print(f"{title}: {total} to make", file=sys.stderr, flush=True)

        def advance(count: int) -> None:
            nonlocal said
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"{title}: {count} of {total}", file=sys.stderr, flush=True)

        yield advance
        print(f"{title}: done in {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        return
    import rich.console
    import rich.progress

    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.MofNCompleteColumn())
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.update(task, completed=min(count, total))
