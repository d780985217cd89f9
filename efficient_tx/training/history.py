"""History: metrics.jsonl, the only record of what a run measured; all reports are made from it.

Beside it lies metrics.crc32, one checksum a line. The checksum is appended before its line, so a kill leaves at most a
checksum, or a part of a line, too many. Every checkpoint has a copy of both files, up to its step.
"""

import difflib
import json
import math
import os
import weakref
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from efficient_tx.task import Objective
from efficient_tx.training.disk import still_there, write_bytes, writing
from efficient_tx.training.errors import Gone, Refused
from efficient_tx.training.objective import CLASSIFICATION

Line = dict[str, Any]

# Fields that differ between machines and between runs; all others are the same bit for bit.
TIMINGS = ("seconds", "data_seconds", "examples_per_second")
NAME = "metrics.jsonl"


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

    Attributes:
      lines: those that are intact.
      damaged: numbers, from 1, of those that are not: their CRC-32 differs, or they are no metric lines.
      missing: how many are missing at the end, by the checksums; a kill, or a run that is going on, leaves one.
      checked: whether there are checksums; runs of older versions have none.

    Raises:
      Refused: the file cannot be read.
    """

    def __init__(self, path: Path, *, writer: bool = True):
        self.path, self._writer = path, writer
        self.lines, self.damaged, self.missing, self.checked = read(path)
        self._files = None

    @property
    def damage(self) -> str:
        """What is wrong in words: "line 3 is damaged (CRC-32 differs from metrics.crc32)"."""
        if not self.damaged:
            return f"{self.missing} at its end are missing" if self.missing else "lines are missing"
        why = f"CRC-32 differs from {_beside(self.path).name}" if self.checked else "no metric line"
        return f"{_numbered(self.damaged)} damaged ({why})"

    @property
    def unchecked(self) -> str:
        """A line if there are metric lines without checksums; else empty."""
        return "" if self.checked or not self.lines else f"{self.path} has no {_beside(self.path).name}: read unchecked"

    def append(self, line: Line) -> None:
        """Adds a line. It is on disk when this returns.

        Raises:
          Gone: a file of this history was deleted, replaced or written by someone else.
          RunError: it cannot be written.
        """
        line = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in line.items()}
        if self._writer:
            if self._files is None:
                self._write()
            text = encode(line)
            for file, content in zip(self._files, (checksum(text), text)):
                file.append(content)
        self.lines.append(line)

    def rewind(self, step: int, copy: Path | None = None, warn: Callable[[str], None] = lambda line: None) -> None:
        """Drops the lines after `step` and an incomplete last line.

        Args:
          step: the run goes on from the checkpoint of this step.
          copy: the folder of that checkpoint. Lines that are damaged or missing here come from its copy.
          warn: gets one line if there are such lines.
        """
        lines = [line for line in self.lines if line["step"] <= step]
        saved = read(copy / NAME) if copy else NOTHING
        if not saved.checked:  # of an older version, or killed before it was written
            saved = NOTHING
        lost = f"{self.path}: {self.damage}" if self.damaged else ""
        if saved.damaged:
            warn(f"{copy / NAME}: {_numbered(saved.damaged)} damaged; {self.path} is used")
        elif lines[: len(saved.lines)] != saved.lines:
            known = [(line["step"], line["split"]) for line in saved.lines]
            lines = saved.lines + [line for line in lines if (line["step"], line["split"]) not in known]
            warn(f"{lost or f'{self.path} lacks lines'}: restored from the checkpoint of step {step}")
        elif lost and not saved.lines:
            aside = self.path.with_name("metrics.damaged.jsonl")
            warn(f"{lost} and lost; {aside} is the file as it was")
            if self._writer and not aside.exists():
                write_bytes(aside, self.path.read_bytes())
        elif lost:
            warn(f"{lost}; the lines up to step {step} are not, and the run goes on from there")
        if unchecked := self.unchecked:
            warn(unchecked)
        self.lines, self.damaged, self.missing, self.checked = lines, [], 0, True
        if self._writer:
            self._write()

    def complete(self, copies: Iterable["Read"]) -> list[Line]:
        """Adds the lines that only copies in checkpoints have, in their places, and returns them."""
        known = {(line["step"], line["split"]) for line in self.lines}
        found = {(line["step"], line["split"]): line for copy in copies for line in copy.lines}
        added = [line for key, line in found.items() if key not in known]
        self.lines = sorted(self.lines + added, key=lambda line: line["step"])
        return added

    def copy(self, folder: Path) -> None:
        """Writes a copy into the folder of a checkpoint. A kill leaves the old one, or a checksum too many."""
        if self._writer:
            texts = [encode(line) for line in self.lines]
            write_bytes(_beside(folder / NAME), b"".join(map(checksum, texts)))
            write_bytes(folder / NAME, b"".join(texts))

    def validated(self, step: int) -> bool:
        """Whether there is a validation line of `step`."""
        return any(line["step"] == step for line in self.of("validation"))

    def of(self, split: str) -> list[Line]:
        """The lines of one split."""
        return [line for line in self.lines if line["split"] == split]

    def ranked(self, objective: Objective = CLASSIFICATION) -> list[int]:
        """Validated steps, best first by the objective; of equal ones the earliest first. Those without number last."""

        def key(line):
            value = line.get(objective.best)
            sign = -1 if objective.higher_is_better else 1
            return (value is None, sign * (value or 0), line["step"])

        return [line["step"] for line in sorted(self.of("validation"), key=key)]

    def _write(self) -> None:
        """Replaces files that differ from `lines`, the lines first: a kill leaves checksums too many."""
        texts = [encode(line) for line in self.lines]
        for path, content in [
            (self.path, b"".join(texts)),
            (_beside(self.path), b"".join(map(checksum, texts))),
        ]:
            if not path.exists() or path.read_bytes() != content:
                write_bytes(path, content)
        self._files = [_Appended(_beside(self.path)), _Appended(self.path)]


class _Appended:
    """A file that only this object appends to. It stays open: see `still_there`."""

    def __init__(self, path: Path):
        self._path = path
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        weakref.finalize(self, os.close, self._descriptor)
        self._size = os.fstat(self._descriptor).st_size

    def append(self, content: bytes) -> None:
        """Writes the bytes through to the disk."""
        still_there(self._descriptor, self._path)
        if os.fstat(self._descriptor).st_size != self._size:
            raise Gone(f"{self._path} was changed by someone else during the run")
        self._size += len(content)
        with writing(self._path):
            while content:
                content = content[os.write(self._descriptor, content) :]
            os.fsync(self._descriptor)


class Read(NamedTuple):
    """What is in a file of metric lines: see `History`."""

    lines: list[Line]
    damaged: list[int]
    missing: int
    checked: bool


NOTHING = Read([], [], 0, False)


def read(path: Path) -> Read:
    """Reads metric lines and compares them with their checksums, if there are any.

    Raises:
      Refused: a file cannot be read.
    """
    beside = _beside(path)
    try:
        # In this order: of a run that is going on, the checksums are ahead.
        content = path.read_bytes() if path.exists() else b""
        checked = beside.exists()
        stored = beside.read_bytes() if checked else b""
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from None
    *texts, tail = content.split(b"\n")
    texts = [text + b"\n" for text in texts]
    found = [checksum(text) for text in texts]
    width = len(checksum(b""))
    expected = [stored[i : i + width] for i in range(0, len(stored) - width + 1, width)] if checked else found
    if tail and checksum(tail[:-1] + b"\n") in expected[len(texts) :]:
        # No part of a line: its end is damaged.
        texts.append(tail)
        found.append(checksum(tail))
    lines, damaged, missing, number, place = [], [], 0, 0, 0
    # A line that is damaged, split or joined with the next leaves the others where they were.
    for i, j, size in difflib.SequenceMatcher(None, expected, found, autojunk=False).get_matching_blocks():
        if size or j > place:
            damaged += range(number + 1, number + 1 + max(i - number, j - place))
        else:  # at the end checksums may be left over
            missing = i - number
        for text in texts[j : j + size]:
            i += 1
            line = _parse(text)
            if line is None:
                damaged.append(i)
            else:
                lines.append(line)
        number, place = i, j + size
    return Read(lines, damaged, missing, checked)


def copies_in(checkpoints: Path) -> list[Read]:
    """The copies in the checkpoints of a folder, the oldest first; without those of older versions, unchecked."""
    steps = sorted(int(folder.name) for folder in checkpoints.glob("*") if folder.name.isdecimal())
    return [copy for step in steps if (copy := read(checkpoints / str(step) / NAME)).checked]


def read_lines(path: Path) -> list[Line]:
    """The intact lines of metrics.jsonl; [] if there is no file."""
    return read(path).lines


def encode(line: Line) -> bytes:
    """A line of metrics.jsonl."""
    return (json.dumps(line) + "\n").encode()


def checksum(text: bytes) -> bytes:
    """A line of metrics.crc32, of fixed width: the CRC-32 of a line of metrics.jsonl with its end."""
    return b"%08x\n" % zlib.crc32(text)


def _beside(path: Path) -> Path:
    return path.with_suffix(".crc32")


def _numbered(numbers: list[int]) -> str:
    """[3, 5] -> "lines 3, 5 are"."""
    shown = ", ".join(map(str, numbers[:8])) + (" ..." if numbers[8:] else "")
    return f"lines {shown} are" if numbers[1:] else f"line {shown} is"


def _parse(text: bytes) -> Line | None:
    """The metric line; None if it is none."""
    try:
        line = json.loads(text)
        if not isinstance(line, dict) or line.get("split") not in ("train", "validation"):
            return None
        numbers = [value for key, value in line.items() if key != "split"]
        sound = all(type(x) in (int, float, type(None)) and math.isfinite(x or 0) for x in numbers)
    except (ValueError, OverflowError, RecursionError):
        return None
    return line if sound and "loss" in line and type(line.get("step")) is int else None
