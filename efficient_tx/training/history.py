"""History: metrics.jsonl, the only record of what a run measured; all reports are made from it."""

import json
import math
import os
from pathlib import Path
from typing import Any

from efficient_tx.task import Objective
from efficient_tx.training.objective import CLASSIFICATION
from efficient_tx.training.workdir import write_bytes, writing

Line = dict[str, Any]

# Fields that differ between machines and between runs; all others are the same bit for bit.
TIMINGS = ("seconds", "data_seconds", "examples_per_second")


class History:
    """metrics.jsonl: one JSON object per line, in the order of steps.

    Every line has `step`, `split` ("train" or "validation"), `loss` and the metrics of the objective (`accuracy`):
    means over the steps since the last train line, or over the split. Train lines add

      learning_rate: of the update of this step.
      grad_norm: before clipping, mean over the window.
      seconds: training time, without evaluation and saving.
      data_seconds: the part of `seconds` that was spent waiting for batches.
      examples_per_second: null if no step was timed.

    The last three cover the steps of the window that this process ran, except its first step, which compiles. A number
    that is not finite is null.

    Args:
      path: the file; it need not exist.
      writer: whether to write the file; if not, only `lines` changes.
    """

    def __init__(self, path: Path, *, writer: bool = True):
        self.path, self._writer = path, writer
        self.lines = read_lines(path)

    def append(self, line: Line) -> None:
        """Adds a line. It is on disk when this returns."""
        line = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        self.lines.append(line)
        if self._writer:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drops the lines after `step` and an incomplete last line, by one atomic replacement of the file."""
        self.lines = [line for line in self.lines if line["step"] <= step]
        content = "".join(json.dumps(line) + "\n" for line in self.lines).encode()
        if self._writer and (not self.path.exists() or self.path.read_bytes() != content):
            write_bytes(self.path, content)

    def validated(self, step: int) -> bool:
        """Whether there is a validation line of `step`."""
        return any(line["step"] == step for line in self.of("validation"))

    def of(self, split: str) -> list[Line]:
        """The lines of one split."""
        return [line for line in self.lines if line["split"] == split]

    def ranked(self, objective: Objective = CLASSIFICATION) -> list[int]:
        """Validated steps, best first by the objective; of equal ones the earliest first."""
        sign = -1 if objective.higher_is_better else 1
        ranked = sorted(self.of("validation"), key=lambda line: (sign * line[objective.best], line["step"]))
        return [line["step"] for line in ranked]


def read_lines(path: Path) -> list[Line]:
    """The complete lines of metrics.jsonl, up to the first that is not JSON; [] if there is no file."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:
            break
        lines.append(line)
    return lines
