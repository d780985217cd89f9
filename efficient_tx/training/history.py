"""History: metrics.jsonl, the one record of what a run measured; everything else is drawn from it."""

import json
import math
import os
from pathlib import Path
from typing import Any

from efficient_tx.task import Objective
from efficient_tx.training.objective import CLASSIFICATION
from efficient_tx.training.workdir import write_bytes, writing

Line = dict[str, Any]

# Fields that differ from one machine, and one run, to the next; all others are the same bit for bit.
TIMINGS = ("seconds", "data_seconds", "examples_per_second")


class History:
    """metrics.jsonl: one JSON object a line, in the order of steps.

    Every line has `step`, `split` ("train" or "validation"), `loss` and the objective's metrics (`accuracy`), means
    over the steps since the last train line, or over the split. Train lines add `learning_rate` (of that step's
    update), `grad_norm` (before clipping, mean over the window), and of the part of the window that this process ran,
    without its first step, which compiles: `seconds`, evaluation and saving excluded, `data_seconds` of them waiting
    for batches, and `examples_per_second` (null where there is no such part). A number that is not finite is null.

    Args:
      path: the file; it need not exist.
      writer: whether to write it; otherwise only `lines` follow.
    """

    def __init__(self, path: Path, *, writer: bool = True):
        self.path, self._writer = path, writer
        self.lines = read_lines(path)

    def append(self, line: Line) -> None:
        """Adds a line. Once this returns, a killed process has not lost it."""
        line = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        self.lines.append(line)
        if self._writer:
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drops the lines after `step`, and a last one that was only half written, in one atomic replacement."""
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
        """Validated steps, the best by the objective first, and of equal ones the earliest."""
        sign = -1 if objective.higher_is_better else 1
        ranked = sorted(self.of("validation"), key=lambda line: (sign * line[objective.best], line["step"]))
        return [line["step"] for line in ranked]


def read_lines(path: Path) -> list[Line]:
    """The complete lines of metrics.jsonl, up to the first that is no JSON; [] where there is no file."""
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
