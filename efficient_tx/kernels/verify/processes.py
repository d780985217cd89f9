"""Work shared out over processes: an interpreter or a compiler takes one core."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import jax

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    function: Callable[[Item], Result], items: Sequence[Item], *, jobs: int, progress: Callable[[str], Any], what: str,
    name: Callable[[Item], str] = str,
) -> Iterator[Result]:  # fmt: skip
    """The results in order, of `jobs` processes at once; with one, of this process.

    `progress` is told of each item that is waited for, by its `name` and its number among these, and `what` is done.
    With more than one job, function, items and results go from process to process: they can be pickled. The processes
    end with the iterator, and with this process.

    Raises:
      ChildProcessError: one of the processes was ended.
    """
    with contextlib.nullcontext(map) if jobs == 1 else processes(jobs) as run:
        results = iter(run(function, items))
        for number, item in enumerate(items, 1):
            progress(f"{what}: {number} of {len(items)}, {name(item)}")
            yield next(results)


@contextlib.contextmanager
def processes(count: int) -> Iterator[Callable]:
    """`map`, of this many processes."""
    context = multiprocessing.get_context("spawn")
    watched, alive = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(count, context, begin, (watched,))
    try:
        yield pool.map
    except BrokenProcessPool as error:
        fault = f"one of {count} processes was ended, as for want of memory: use fewer jobs"
        raise ChildProcessError(fault) from error
    except BaseException:
        alive.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        alive.close()


def begin(watched: Connection) -> None:
    """Of a process: it compiles for accelerators and uses none, and Ctrl-C is for the one that started it."""
    threading.Thread(target=end_with, args=(watched,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    jax.config.update("jax_platforms", "cpu")


def end_with(watched: Connection) -> None:
    """Ends this process when the other end is closed, by its owner or by the owner's end."""
    with contextlib.suppress(EOFError):
        watched.recv()
    os._exit(1)
