"""Runner: starts the runs of a sweep as processes, some at once, and gathers how they ended."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_tx.config.stored import workdir_of
from efficient_tx.sweep.plan import Run
from efficient_tx.sweep.watch import latest, validated
from efficient_tx.training.errors import InUse, NonFinite, Refused, RunError
from efficient_tx.training.workdir import diverged

TICK = 0.5
# Between two looks at a workdir that another process holds.
BUSY = 5.0
LAST_LINES = 5


@dataclasses.dataclass
class Child:
    """A run that this sweep has started, on one of the `shares` of cores. Its part of the log begins at `begins`."""

    run: Run
    process: subprocess.Popen
    log: Path
    begins: int
    share: int = 0
    pausing: bool = False


@dataclasses.dataclass(frozen=True)
class Failure:
    """A run that did not end well.

    Attributes:
      status: as of train.py; negative for a signal that ended it.
      log: its output.
      lines: the last ones of it.
    """

    run: Run
    status: int
    log: Path
    lines: Sequence[str]

    @property
    def diverged(self) -> bool:
        """Whether a loss or a gradient was not finite: it would be so again."""
        return self.status == NonFinite.status

    @property
    def reason(self) -> str:
        if self.status < 0:
            name = signal.Signals(-self.status).name
            return f"ended by {name}" + ", as for lack of memory" * (name == "SIGKILL")
        return "not finite" if self.diverged else f"exit status {self.status}"


def result_of(run: Run) -> dict[str, Any] | None:
    """The summary of a run if it is finished, else None.

    Raises:
      InUse: a live process has the workdir.
      NonFinite: the run diverged, as it would again.
      Refused: it has a run of another config.
    """
    workdir = workdir_of(run.workdir, run.config, typed=run.typed)
    try:
        workdir.claim()
        result = workdir.summary()
        if result is None and (reason := diverged(workdir.path)):
            raise NonFinite(f"{reason}. That was before: it is not run again unless {run.workdir} is deleted")
        return result
    finally:
        workdir.release()


class Runner:
    """Carries out runs, in order, `jobs` at once; a finished one is skipped, a broken one goes on where it stopped.

    One that another process holds is looked at again until that process has let it go.

    Args:
      jobs: how many at once.
      until: a step at which runs pause, so that all come to it before any goes on; None for none.
      logs: the folder for what they print, a file for each.
      environment: of the processes.
      show: is called with the runner whenever something may have changed.
      say: gets a line on each run that starts or ends.

    Attributes:
      results: name -> summary of the finished runs, those from before included.
      failures: name -> failure.
      live: the running ones.
      busy: names of runs that other processes hold.
      paused: names of runs that have come to `until`.
    """

    def __init__(
        self,
        jobs: int,
        until: int | None,
        logs: Path,
        environment: Mapping[str, str],
        show: Callable[["Runner"], None],
        say: Callable[[str], None],
    ):
        self._jobs, self._until, self._logs, self._environment, self._show, self._say = (
            jobs, until, logs, environment, show, say,
        )  # fmt: skip
        self.results: dict[str, dict[str, Any]] = {}
        self.failures: dict[str, Failure] = {}
        self.live: list[Child] = []
        self.busy: set[str] = set()
        self.paused: set[str] = set()
        self._refused: set[str] = set()

    def carry_out(self, runs: Sequence[Run]) -> None:
        """Returns when every run has finished or failed. However it is left, no run of it goes on."""
        open_runs, looked = list(runs), -BUSY
        try:
            while open_runs or self.live:
                self._reap(open_runs)
                self._pause()
                if self.busy and time.monotonic() - looked > BUSY:
                    self.busy.clear()
                    looked = time.monotonic()
                while len(self.live) < self._jobs and (free := [r for r in open_runs if r.name not in self.busy]):
                    self._take(free[0], open_runs)
                self._show(self)
                if self.live or self.busy:
                    time.sleep(TICK)
        finally:
            self.stop()

    def stop(self) -> None:
        """Ends the children; they save their state. Returns when they have ended."""
        for child in self.live:
            child.process.terminate()
        while self.live:
            self.live.pop().process.wait()

    def _take(self, run: Run, open_runs: list[Run]) -> None:
        """Starts a run, or finds that it is finished or held by another process."""
        try:
            result = result_of(run)
        except InUse as error:
            self.busy.add(run.name)
            self._say(f"waiting for {run.name}: {error}")
            return
        except RunError as error:
            open_runs.remove(run)
            self.failures[run.name] = Failure(run, error.status, self._log(run), [str(error)])
            return
        open_runs.remove(run)
        if result is not None:
            self.results[run.name] = result
            return
        if self._reached(run):
            self.paused.add(run.name)
            return
        log = self._log(run)
        share = min({*range(self._jobs)} - {child.share for child in self.live})
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            begins = output.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "efficient_tx.sweep.child", *run.arguments],
                stdin=subprocess.PIPE,  # see child.py
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which ends them, once
            )
        keep_to(shares(self._jobs)[share], process.pid)
        self.live.append(Child(run, process, log, begins, share))
        self._say(f"started {run.name}")

    def _reap(self, open_runs: list[Run]) -> None:
        """Notes the children that have ended."""
        for child in [child for child in self.live if child.process.poll() is not None]:
            self.live.remove(child)
            child.process.stdin.close()
            run, status = child.run, child.process.returncode
            result = None
            if status in (0, Refused.status):
                # Another process may have had the workdir for a moment, and may have it still.
                with contextlib.suppress(RunError):
                    result = result_of(run)
                if result is None and run.name not in self._refused:
                    self._refused.add(run.name)
                    open_runs.insert(0, run)
                    continue
            if result is not None:
                self.results[run.name] = result
                self._say(f"finished {run.name}")
            elif child.pausing and status == 128 + signal.SIGTERM:
                self.paused.add(run.name)
                self._say(f"paused {run.name}")
            else:
                failure = Failure(run, status, child.log, last_lines(child.log, child.begins))
                self.failures[run.name] = failure
                self._say(f"{run.name}: {failure.reason}")

    def _pause(self) -> None:
        """Ends the children that have come far enough; they save their state."""
        for child in self.live:
            if not child.pausing and self._reached(child.run):
                child.pausing = True
                child.process.terminate()

    def _reached(self, run: Run) -> bool:
        """Whether a run has been evaluated at the step at which it is to pause, or later, and is not at its end."""
        return self._until is not None and self._until <= validated(latest(run.workdir)) < run.config.steps

    def _log(self, run: Run) -> Path:
        return self._logs / f"{run.name}.txt"


def shares(jobs: int) -> list[set[int]]:
    """The cores of each of the runs at once: equal shares where they can be equal, else all of them.

    Programs that share cores wait for each other: two runs on a core each take 0.85 of the time of two on both.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    even = len(cores) % jobs == 0
    return [set(cores[one::jobs] if even else cores) for one in range(jobs)]


def keep_to(cores: set[int], pid: int) -> None:
    """Keeps a process that has just started to these cores, if this system can; it ends in its own way if it has."""
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(pid, cores)


def last_lines(path: Path, begins: int = 0) -> list[str]:
    """The last lines of a file after byte `begins`, of its last 16 KB."""
    try:
        with open(path, "rb") as file:
            file.seek(max(begins, os.fstat(file.fileno()).st_size - 2**14))
            return file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        return []
