"""The processes of one run: how they join, how they compare notes, and how each ends when another one is lost."""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from efficient_tx.training.errors import Refused, RunError

# Seconds without a sign of life after which a process is lost, and seconds to wait for all to join.
LOST_AFTER, JOIN_WITHIN = 60, 300


class Apart(Refused):
    """The processes differ in what must be the same."""

    together = True


class Drifted(RunError):
    """The processes do not hold the same parameters any more."""

    together = True


class Lost(RunError):
    """Another process of the run is gone, or never came."""

    @classmethod
    def of(cls, error: jax.errors.JaxRuntimeError) -> "Lost":
        """The error, in one line, that a collective operation raised when another process was gone."""
        said = " ".join(str(error).split())
        # jaxlib repeats itself, once for each operation that waited.
        return cls(f"process {jax.process_index()} of the run lost another one (...{said[-160:]})")


def join(
    address: str | None,
    count: int | None,
    index: int | None,
    *,
    lost_after: int = LOST_AFTER,
    within: int = JOIN_WITHIN,
) -> None:
    """Joins the other processes of a run; does nothing if none of the first three is given.

    jaxlib ends a process that loses another one by abort(), and writes a page about it. From here on such an end is
    one line and exit status 1, and what jaxlib writes to the standard error goes into a file that the line names.

    Args:
      address: HOST:PORT of process 0.
      count: number of processes.
      index: which of them this is, from 0.
      lost_after: seconds without a sign of life after which a process counts as lost.
      within: seconds to wait for the others, at the beginning and at the end.

    Raises:
      Refused: an argument is missing or cannot be right.
    """
    if (address, count, index) == (None,) * 3:
        return
    check(address, count, index)
    others = [other for other in range(count) if other != index]
    phase = "joining"

    def when_aborted(said: str) -> str:
        if phase == "running":
            return f"process {index} of the run lost another one: {lost(said, count)}"
        if "ALREADY_EXISTS" in said:
            return f"another process {index} joined the run at {address}: each needs a number of its own"
        if "Unexpected task" in said:
            return f"process {index} is too many: process 0 at {address} was told of fewer than {count} processes"
        return f"process {index} waited {within} s in vain until {named(others)} had joined the run at {address}"

    ending_in_a_line(when_aborted)
    if count > 1:
        print(f"process {index} waits for {named(others)} of the run at {address}", file=sys.stderr, flush=True)
    jax.distributed.initialize(
        address,
        count,
        index,
        initialization_timeout=within,
        heartbeat_timeout_seconds=lost_after,
        shutdown_timeout_seconds=within,
    )
    phase = "running"
    # Gloo waits no longer than 30 s for the others when they first talk to each other, and as long as need be later.
    # Now all are here; by the first step they may be minutes apart, having read data and compiled.
    jax.pmap(lambda one: jax.lax.psum(one, "devices"), axis_name="devices")(np.ones(jax.local_device_count()))
    gathered(b"")


def check(address: str | None, count: int | None, index: int | None) -> None:
    """Raises Refused where the arguments of `join` cannot be right."""
    given = {"coordinator_address": address, "num_processes": count, "process_id": index}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        there = next(name for name in given if name not in missing)
        line = f"{given[there]}: a run over several processes needs {' and '.join(missing)} too"
        raise Refused(line, option=there)
    if count < 1:
        raise Refused(f"{count}: a run has at least 1 process", option="num_processes")
    if not 0 <= index < count:
        raise Refused(f"{index}: it must lie in [0, {count - 1}], there are {count} processes", option="process_id")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise Refused(f"{address}: it must be HOST:PORT of process 0, like 10.0.0.1:1234", option="coordinator_address")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except OSError as error:
        raise Refused(f"{address}: {error.strerror}", option="coordinator_address") from None
    if index == 0:
        try:
            # As jaxlib will: on all addresses of this machine.
            socket.create_server(("", int(port))).close()
        except OSError as error:
            line = f"{address}: port {port} of this machine cannot be used ({error.strerror})"
            raise Refused(line, option="coordinator_address") from None


def agree(facts: Mapping[str, Any]) -> None:
    """Makes sure that all processes know the same facts.

    Args:
      facts: JSON values by name, "optimizer.learning_rate": 0.001.

    Raises:
      Apart: they differ; every process names the first differences between process 0 and another one.
    """
    first, *others = (json.loads(text) for text in gathered(json.dumps(facts).encode()))
    for index, other in enumerate(others, start=1):
        differing = [
            f"{name} is {first.get(name, 'absent')!r} in process 0 and {other.get(name, 'absent')!r} in process {index}"
            for name in sorted(first.keys() | other.keys())
            if first.get(name, "absent") != other.get(name, "absent")
        ]
        if differing:
            more = f"; and {len(differing) - 4} more" if differing[4:] else ""
            raise Apart(f"the processes of the run differ: {'; '.join(differing[:4])}{more}")


def check_equal(digest: int, what: str) -> None:
    """Makes sure that all processes have the same `digest`, below 2³², of `what`.

    Raises:
      Drifted: they differ.
    """
    if jax.process_count() > 1:
        first, *others = (int(text) for text in gathered(str(digest).encode()))
        odd = [index for index, other in enumerate(others, start=1) if other != first]
        if odd:
            raise Drifted(f"{what} are not the same in {named(odd)} as in process 0: they are not saved")


def part() -> None:
    """Waits until all processes have got here, so that none takes the end of another one for a loss."""
    if jax.process_count() > 1:
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()


def gathered(text: bytes) -> list[bytes]:
    """The `text` of every process, in their order. All processes call this."""
    if jax.process_count() == 1:
        return [text]
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(max(1, lengths.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:length].tobytes() for row, length in zip(rows, lengths, strict=True)]


def named(processes: Sequence[int]) -> str:
    """[1] -> "process 1", [1, 2, 3] -> "processes 1, 2, 3"."""
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes[:8]))}{', ...' * (len(processes) > 8)}"


def lost(said: str, count: int) -> str:
    """Which process is gone, as far as jaxlib's words tell."""
    for index in range(count):
        if f"Task {index} heartbeat timeout" in said or f"heartbeats):\n{index}\n" in said:
            return f"process {index} gives no sign of life"
    return "process 0 is gone" if "Socket closed" in said or "UNAVAILABLE" in said else "see there"


_ending = threading.Lock()
_status = Lost.status
_kept: list[Any] = []  # ctypes does not keep what C calls back


def last_words(line: str, status: int) -> int:
    """Prints the line with which this process ends, and returns its exit status.

    When another process is lost, the main thread learns it from a collective operation, and another thread by jaxlib's
    abort(). Who comes first has the word, and its status stays.
    """
    global _status
    if not _kept or _ending.acquire(blocking=False):
        _status = status
        print(line, file=sys.stderr, flush=True)
    return status


def ending_in_a_line(line: Callable[[str], str]) -> None:
    """Makes an abort() of jaxlib a line and exit status 1.

    From here on, C++ writes its standard error to a file, and `sys.stderr` goes on to where it went. abort() runs its
    handler in the thread that called it, as any function, so that Python may run in it.

    Args:
      line: from what jaxlib wrote to the line that is printed.
    """
    log = Path(tempfile.gettempdir()) / f"efficient_tx-jaxlib-{os.getpid()}.log"
    with contextlib.suppress(OSError, AttributeError, ValueError):
        sys.stderr = open(os.dup(sys.stderr.fileno()), "w", buffering=1)  # noqa: SIM115 (lives as long as the process)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600), 2)
        atexit.register(log.unlink, missing_ok=True)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def aborted(_: int) -> None:
        if _ending.acquire(blocking=False):
            said = log.read_text(errors="replace") if log.exists() else ""
            print(f"{line(said)}; jaxlib's words: {log}", file=sys.stderr, flush=True)
        os._exit(_status)

    _kept.append(aborted)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), aborted)
