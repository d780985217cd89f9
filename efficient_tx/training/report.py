"""Report: what a run shows while it trains: progress bar or plain lines, loggers, learning curve."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from efficient_tx.task import Objective
from efficient_tx.training import curve
from efficient_tx.training.history import History, Line
from efficient_tx.training.loggers import LOGGERS
from efficient_tx.training.objective import CLASSIFICATION

# Drawing takes a few tenths of a second: a run that evaluates every second should not spend its time on pictures.
SECONDS_BETWEEN_PICTURES = 10.0


class Report:
    """Shows the metric lines of a run.

    Args:
      path: the workdir.
      history: its metrics.jsonl.
      steps: length of the run.
      batch_size: examples of a step.
      config: stored by the loggers beside the lines.
      loggers: keys of LOGGERS; a line reports one that is not installed, and the run continues without it.
      title: of the learning curve.
      objective: of the task; its loss and metrics are shown.
      baselines: scores to beat in `objective.best`, by name.
      active: False if another process reports.
    """

    def __init__(
        self,
        path: Path,
        history: History,
        *,
        steps: int,
        batch_size: int,
        config: Mapping[str, Any],
        loggers: Sequence[str] = (),
        title: str = "",
        objective: Objective = CLASSIFICATION,
        baselines: Mapping[str, float] | None = None,
        active: bool = True,
    ):
        self._path, self._history, self._steps, self._batch_size = path, history, steps, batch_size
        self._config, self._names, self._title, self._baselines = config, loggers, title, baselines or {}
        self._objective = objective
        self._active, self._loggers, self._pictured = active, [], -SECONDS_BETWEEN_PICTURES
        self.console = Console(highlight=False, quiet=not active, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[latest]}"),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = None
        self._first: tuple[int, float] | None = None  # step and time of the first train line, after compilation

    def start(self, step: int) -> None:
        """Opens the loggers and the progress bar; the run continues after `step`."""
        for name in self._names if self._active else ():
            try:
                self._loggers.append(LOGGERS[name](self._path, step, self._config))
            except ImportError:
                self.say(f"the logger {name!r} is not installed (pip install {name}): going on without")
        self._bar.start()
        self._task = self._bar.add_task("", total=self._steps, completed=step, latest="compiling", left="-:--:--")

    def say(self, line: str) -> None:
        """Prints one line, above the bar."""
        self.console.print(Text(line))

    def progress(self, step: int) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=step)

    def add(self, line: Line) -> None:
        """Records a line of metrics.jsonl and shows it."""
        self._history.append(line)
        for logger in self._loggers:
            logger.write(line)
        scores = "  ".join(f"{name} {line[name]:.4f}" for name in self._objective.names)
        if line["split"] == "validation":
            self.say(f"step {line['step']}/{self._steps}  validation  {scores}")
            return
        speed = line["examples_per_second"]
        latest = scores + (f"  {speed:.0f} examples/s" if speed else "")
        left = self._left(line)
        self._bar.update(self._task, latest=latest, left=left)
        if not self.console.is_terminal:
            self.say(f"step {line['step']}/{self._steps}  train  {latest}  {left} left")

    def draw(self, *, last: bool = False) -> None:
        """Draws curve.png again, unless the last picture is only seconds old; with `last` always."""
        if self._active and (last or time.monotonic() - self._pictured > SECONDS_BETWEEN_PICTURES):
            curve.draw(
                self._path / "curve.png",
                self._history.lines,
                title=self._title,
                metric=self._objective.best,
                baselines=self._baselines,
            )
            self._pictured = time.monotonic()

    def close(self) -> None:
        """Removes the bar and closes the loggers."""
        self._bar.stop()
        while self._loggers:
            self._loggers.pop().close()

    def _left(self, line: Line) -> str:
        """Time until the last step, at the speed of this process since its first train line, evaluations included.

        At that line itself, which follows the compilation, at the speed of its steps.
        """
        step, now = line["step"], time.monotonic()
        first, since = self._first = self._first or (step, now)
        if step > first:
            seconds_per_step = (now - since) / (step - first)
        elif line["examples_per_second"]:
            seconds_per_step = self._batch_size / line["examples_per_second"]
        else:
            return clock(None)
        return clock((self._steps - step) * seconds_per_step)

    def summarise(self, step: int, result: Mapping[str, Any]) -> None:
        """Gives the loggers what is known at the end: the scores of the test split, and the settings they belong to."""
        for name in self._names if self._active else ():
            with contextlib.suppress(ImportError):
                logger = LOGGERS[name](self._path, step, self._config)
                logger.summarise(step, result)
                logger.close()


def clock(seconds: float | None) -> str:
    """A span of time, "1:02:03"; None is not known."""
    if seconds is None:
        return "-:--:--"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"
