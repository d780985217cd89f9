"""Display: how far a sweep has come, as a live table on a terminal and as lines elsewhere."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from efficient_tx.sweep.plan import Cell, Run
from efficient_tx.sweep.runner import Runner
from efficient_tx.sweep.watch import done, latest
from efficient_tx.training import summary
from efficient_tx.training.report import clock


class Clock:
    """Predicts the time that runs will take, from the seconds a step of their cell has taken.

    A cell of which no step is known yet takes the mean of the others.
    """

    def __init__(self):
        self._seconds: dict[Cell, float] = {}
        self._first: dict[str, tuple[int, float]] = {}

    def saw(self, run: Run, step: int, now: float) -> None:
        """A live run has come to `step`."""
        first, since = self._first.setdefault(run.name, (step, now))
        if step > first:
            self._seconds[run.cell] = (now - since) / (step - first)

    def ended(self, run: Run, result: Mapping[str, Any]) -> None:
        """A run is finished. Its own speed stands in if no step of it was seen."""
        if speed := result.get("steps_per_second"):
            self._seconds.setdefault(run.cell, 1 / speed)

    def left(self, cell: Cell, steps: int) -> float | None:
        """Seconds for further steps; None if nothing is known."""
        if not self._seconds:
            return None
        return steps * self._seconds.get(cell, fmean(self._seconds.values()))


class Display:
    """Shows a sweep.

    Args:
      console: where.
      runs: all that are known, tuning first.
      later: cell -> how many runs will follow that are not known yet, as their setting is not chosen.
      jobs: runs at once.
      until: the step at which runs pause, if any.
    """

    def __init__(
        self, console: Console, runs: Sequence[Run], later: Mapping[Cell, int], jobs: int, until: int | None = None
    ):
        self._console, self.runs, self.later, self._jobs = console, list(runs), dict(later), jobs
        self._until = until
        self._clock, self._told = Clock(), set()
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        if self._live:
            self._live.stop()

    def say(self, line: str) -> None:
        """Prints a line, above the table."""
        self._console.print(Text(line), soft_wrap=True)

    def show(self, runner: Runner) -> None:
        """Brings the table up to date; elsewhere, a line when a run has ended."""
        now, steps = time.monotonic(), {}
        for child in runner.live:
            steps[child.run.name] = latest(child.run.workdir)
            if line := steps[child.run.name].get("last"):
                self._clock.saw(child.run, line["step"], now)
        ended = runner.results.keys() | runner.failures.keys() | runner.paused
        for run in self.runs:
            if run.name in runner.results:
                self._clock.ended(run, runner.results[run.name])
        caption = self._caption(runner, steps)
        if self._live:
            self._live.update(self._table(runner, steps, caption), refresh=True)
        elif ended != self._told:
            self.say(caption)
        self._told = set(ended)

    def _left(self, runner: Runner, steps: Mapping[str, Mapping[str, Any]]) -> float | None:
        """Seconds until everything is done: first the tuning, then what it chooses for."""
        parts: dict[str, list[float | None]] = {"tune": [], "run": []}
        for cell, count in self.later.items():
            parts["run"] += [self._clock.left(cell, steps_of(self.runs, cell))] * count
        for run in self.runs:
            if not {run.name} & (runner.results.keys() | runner.failures.keys() | runner.paused):
                left = self._end(run) - done(steps.get(run.name, {}))
                parts[run.purpose].append(self._clock.left(run.cell, max(0, left)))
        total = 0.0
        for seconds in parts.values():
            known = [one for one in seconds if one is not None]
            if len(known) < len(seconds):
                return None
            # Several jobs do not make the longest run shorter.
            total += max(sum(known) / self._jobs, *known, 0.0)
        return total

    def _end(self, run: Run) -> int:
        """The step at which a run ends or pauses."""
        return min(run.config.steps, self._until or run.config.steps)

    def _caption(self, runner: Runner, steps: Mapping[str, Mapping[str, Any]]) -> str:
        total = len(self.runs) + sum(self.later.values())
        counts = {
            "finished": sum(run.name in runner.results for run in self.runs),
            "running": len(runner.live),
            "held by another process": len(runner.busy),
            "paused": len(runner.paused),
            "failed": len(runner.failures),
        }
        counts["to do"] = total - sum(counts[what] for what in ("finished", "running", "paused", "failed"))
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return f"{total} runs: {said}; {clock(self._left(runner, steps))} left"

    def _table(self, runner: Runner, steps: Mapping[str, Mapping[str, Any]], caption: str) -> Table:
        """One row for each run; where they do not fit, for those that run, failed, or come next."""
        table = Table(caption=caption, caption_justify="left")
        for name in ("run", "step", "", "validation", "left"):
            table.add_column(name, justify="left" if name in ("run", "") else "right", no_wrap=name != "run")
        room = max(4, self._console.height - 8)
        live = {child.run.name for child in runner.live}
        shown = self.runs
        if len(shown) > room:
            urgent = [run for run in shown if run.name in live or run.name in runner.failures]
            rest = [run for run in shown if run.name not in runner.results and run not in urgent]
            chosen = {run.name for run in [*urgent, *rest][:room]}
            shown = [run for run in shown if run.name in chosen]
        for run in shown:
            total, seen = run.config.steps, steps.get(run.name, {})
            result = runner.results.get(run.name)
            step, state, score, left = done(seen), Text("to do"), "", ""
            if result is not None:
                metric = summary.metric(result)
                step, state, score = total, Text("finished"), f"{metric} {result[f'val_{metric}']:.4f}"
            elif run.name in runner.failures:
                state = Text(runner.failures[run.name].reason, style="red")
            elif run.name in live:
                state = ProgressBar(total, step, width=20)
                score = seen.get("score", "")
                left = clock(self._clock.left(run.cell, max(0, self._end(run) - step)))
            elif run.name in runner.paused:
                step, state = done(latest(run.workdir)), Text("paused")
            elif run.name in runner.busy:
                state = Text("held by another process")
            table.add_row(run.name, f"{step}/{total}", state, score, left)
        return table


def steps_of(runs: Sequence[Run], cell: Cell) -> int:
    """The steps of a run of the cell."""
    return next(run.config.steps for run in runs if run.cell is cell)
