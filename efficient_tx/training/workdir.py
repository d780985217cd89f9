"""Workdir: the folder of one run. It belongs to one config and to one live process at a time."""

import contextlib
import fcntl
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efficient_tx.files import clear, local_path
from efficient_tx.training.disk import CHECKSUMS, decode, read_checked, still_there, write_checked, writing
from efficient_tx.training.errors import InUse, Refused, RunError

# Folder of the data, interval of train lines, number of checkpoints, loggers: none changes a result.
FREE_KEYS = ("task.data_dir", "log_every", "keep", "loggers")


# Files of runs that were extended, and of runs whose numbers were not finite.
EXTENDED, DIVERGED = "extended.json", "diverged.json"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested mappings into one with dotted keys: {"task": {"name": 1}} -> {"task.name": 1}."""
    flat = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def is_there(path: Path, *, option: str) -> bool:
    """Whether a folder is there; it can be made where it is not.

    Args:
      option: which flag has the path.

    Raises:
      Refused: it cannot be made, or it is a file.
    """
    try:
        there = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        parent = next(parent for parent in path.absolute().parents if parent.exists())
        if not os.access(parent, os.W_OK):
            raise Refused(f"{path} cannot be made: {parent} cannot be written", option=option) from None
        return False
    except (OSError, ValueError) as error:  # a file on the way, a name that is too long or has a NUL byte
        fault = getattr(error, "strerror", None) or str(error)
        raise Refused(f"{str(path)!r:.200} cannot be a folder: {fault}", option=option) from None
    if not there:
        raise Refused(f"{path} is a file: name a folder", option=option)
    return True


def diverged(path: Path) -> str | None:
    """Why the last start of the run in a folder ended in numbers that are not finite; None if it did not."""
    try:
        return str(read_checked(path / DIVERGED)["reason"])
    except (OSError, ValueError, KeyError):
        return None


class Workdir:
    """The folder of one run.

    `claim` refuses runs that must not start; it creates no folder. `begin` creates the folder and config.json. With
    several processes only the `writer` locks and writes.

    Attributes:
      path: the folder; it holds config.json, metrics.jsonl, checkpoints/, event files, curve.png and summary.json, and
        the checksums of those that are read again.
      config: identifies the run, plain JSON values.
      writer: whether this process writes.
      complete: updates a stored config to this version: new keys get their defaults.
      warn: gets one line for each damaged file that can be made again.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        config: Mapping[str, Any],
        *,
        writer: bool = True,
        complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda stored: stored,
        warn: Callable[[str], None] = lambda line: None,
    ):
        try:
            self.path = local_path(path)
        except ValueError as error:
            raise Refused(str(error), option="workdir") from None
        self.config = json.loads(json.dumps(config))
        self.writer = writer
        self.complete = complete
        self.warn = warn
        self._warned = set()
        self._lock = None

    def claim(self) -> None:
        """Locks the folder if it exists and its run is not finished.

        Raises:
          InUse: it belongs to a live run.
          Refused: it belongs to another config, or it cannot be created.
          RunError: it cannot be written.
        """
        if not is_there(self.path, option="workdir"):
            return
        self._check_config()
        # A finished run writes nothing, and its folder may be read-only.
        if self.summary() is None:
            self._take_lock()
            # Another run may have begun here between the first check and the lock.
            self._check_config()

    def begin(self) -> None:
        """Creates and locks the folder, and writes config.json.

        Raises:
          Refused, RunError: as `claim`.
        """
        if not self.writer:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.claim()
        with writing(self.path):
            clear(
                self.path,
                "config.json",
                "summary.json",
                EXTENDED,
                DIVERGED,
                CHECKSUMS,
                "metrics.jsonl",
                "metrics.crc32",
                "wandb.json",
                "curve.png",
            )
            (self.path / DIVERGED).unlink(missing_ok=True)
        file = self.path / "config.json"
        old = file.exists() and not (self.path / CHECKSUMS).exists()
        if old:
            self._say(f"{self.path} has no {CHECKSUMS}, as in older versions: {file.name} was read unchecked")
        if old or self._stored_config() != self.config:
            write_checked(file, self.config)

    def extend(self) -> int | None:
        """Makes a run of fewer steps in the folder this one, which then goes on from its last checkpoint.

        A kill leaves the old run, unfinished at the most, or the new one.

        Returns:
          The steps that it had; None if there is no run, or one that has the steps already.

        Raises:
          Refused: the run there differs in more than fewer steps, or it is live.
        """
        if not (self.path / "config.json").exists() or not (differing := self._differing()):
            return None
        if not _only_longer(differing):
            self._check_config()
        before = differing["steps"][0]
        self._take_lock()
        write_checked(self.path / EXTENDED, {"from": sorted({*self.extended(), before})})
        with writing(self.path):
            for name in ("summary.json", DIVERGED):
                (self.path / name).unlink(missing_ok=True)
        write_checked(self.path / "config.json", self.config)
        return before

    def extended(self) -> list[int]:
        """The numbers of steps at which the run was to end, before it was extended."""
        file = self.path / EXTENDED
        try:
            steps = read_checked(file).get("from", [])
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            self._say(f"{file} {error}: where the run was to end before it was extended is not known")
            return []
        return [step for step in steps if step < self.config["steps"]]

    def diverge(self, reason: str) -> None:
        """Writes why the run cannot come to its end; `begin` takes it back. Without the lock, nothing is written.

        What goes wrong here is not said: the error that is the reason ends the run.
        """
        if self._lock is not None:
            with contextlib.suppress(RunError):
                self.verify()
                write_checked(self.path / DIVERGED, {"reason": reason})

    def verify(self) -> None:
        """Asks whether the folder is the one that was locked.

        Raises:
          Gone: it was deleted or replaced.
        """
        if self._lock is not None:
            still_there(self._lock.fileno(), self.path / "lock")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json: the run is finished.

        Raises:
          Gone: as `verify`.
          RunError: it cannot be written.
        """
        self.verify()
        write_checked(self.path / "summary.json", summary)

    def release(self) -> None:
        """Gives up the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def summary(self) -> dict[str, Any] | None:
        """summary.json of a finished run, else None. None for a damaged one: the last checkpoint makes it again."""
        file = self.path / "summary.json"
        try:
            summary = read_checked(file)
            _check_summary(summary)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._say(f"{file} {error}: the checkpoints are evaluated again")
            return None
        return summary

    def _say(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            self.warn(line)

    def _stored_config(self) -> dict[str, Any] | None:
        """config.json; None if there is none. A damaged one that reads as this run's config is written again."""
        file = self.path / "config.json"
        if not file.exists():
            return None
        try:
            return read_config(self.path)
        except Refused as error:
            with contextlib.suppress(OSError, ValueError):
                if decode(file.read_bytes()) == self.config:
                    self._say(f"{error}. It reads as the config of this run, and is written again")
                    return None
            raise

    def _check_config(self) -> None:
        differing = self._differing()
        if differing:
            said = [f"{key} is {old!r} there and {new!r} here" for key, (old, new) in differing.items()]
            more = f"; and {len(said) - 8} more keys" if len(said) > 8 else ""
            longer = ""
            if _only_longer(differing):
                longer = f", or extend it to {self.config['steps']} steps: python -m efficient_tx.train --extend"
            raise Refused(
                f"{self.path} belongs to a run with another config: {'; '.join(said[:8])}{more}. "
                f"Use a new folder, or that run's values{longer}",
                option="workdir",
            )

    def _differing(self) -> dict[str, tuple[Any, Any]]:
        """Key -> its value there and here, of the keys in which the stored config differs."""
        stored = self._stored_config()
        if stored is None:
            return {}
        with contextlib.suppress(ValueError):  # if it cannot be completed, it is compared as stored
            stored = json.loads(json.dumps(self.complete(stored)))
        old, new = flatten(stored), flatten(self.config)
        values = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in sorted(old.keys() | new.keys())}
        return {key: (one, other) for key, (one, other) in values.items() if key not in FREE_KEYS and one != other}

    def _take_lock(self) -> None:
        if not self.writer or self._lock is not None:
            return
        path = self.path / "lock"
        with writing(path):
            lock = open(path, "a+")  # noqa: SIM115 (the lock lives as long as the open file)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            lock.close()
            raise InUse(
                f"{self.path} is in use by a live run (process {owner}): wait for it, stop it, or use another",
                option="workdir",
            ) from None
        except OSError as error:
            lacks = f"{path}: this file system has no locks ({error.strerror}): start no second run in this folder"
            print(lacks, file=sys.stderr)
        with writing(path):
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
        self._lock = lock


def _only_longer(differing: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether nothing differs but the steps, of which there are more here."""
    if differing.keys() != {"steps"}:
        return False
    old, new = differing["steps"]
    return isinstance(old, int) and old < new


def read_config(path: str | os.PathLike) -> dict[str, Any]:
    """config.json of the run in the folder `path`.

    Raises:
      Refused: there is none, it is not the file that was written, or it is not a JSON object.
    """
    file = Path(path) / "config.json"
    try:
        return read_checked(file)
    except (FileNotFoundError, NotADirectoryError):
        raise Refused(f"{path} is not the workdir of a run: there is no {file}") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{file} {error}: restore it, or use a new folder") from None


def _check_summary(summary: Mapping[str, Any]) -> None:
    """Raises ValueError if a summary, of a version without checksums, lacks what is printed at the end of a run."""
    (metric, *_) = [key.removeprefix("val_") for key in summary if key.startswith("val_")] or [""]
    baselines = summary.get("baselines")
    numbers = [summary.get("best_step"), summary.get(f"test_{metric}")]
    numbers += baselines.values() if isinstance(baselines, dict) else [None]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError("is damaged (scores are missing)")
