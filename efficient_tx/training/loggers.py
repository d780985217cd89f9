"""Loggers: further destinations for the lines of metrics.jsonl."""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from efficient_tx.training.disk import read_checked, write_checked, writing
from efficient_tx.training.errors import Refused
from efficient_tx.training.workdir import flatten


class TensorBoard:
    """Scalars `train/loss`, `validation/accuracy` ... in an event file in the workdir.

    Args:
      path: the workdir.
      step: the run resumes after this step; TensorBoard hides later steps of an earlier process.
    """

    def __init__(self, path: Path, step: int, config: Mapping[str, Any]):
        # Not tensorboardX.SummaryWriter: it writes from a thread and waits forever if the disk is full.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._path, self._event, self._scalar, self._config = path, Event, scalar, config
        with writing(path):
            # A second writer within a second, as at the end of a short run, would replace the file of the first.
            self._writer = EventsWriter(str(path / "events"), f".{os.getpid()}.{secrets.token_hex(4)}")
            if step:
                start = SessionLog(status=SessionLog.START)
                self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, line: Mapping[str, Any]) -> None:
        """Writes and flushes one line of metrics.jsonl."""
        with writing(self._path):
            for name, value in line.items():
                if name not in ("step", "split") and value is not None:
                    summary = self._scalar(f"{line['split']}/{name}", value)
                    self._writer.write_event(self._event(wall_time=time.time(), step=line["step"], summary=summary))
            self._writer.flush()

    def summarise(self, step: int, result: Mapping[str, Any]) -> None:
        """Writes the scores in summary.json, `test/accuracy` ..., and the settings of the run for the tab HPARAMS."""
        from tensorboardX.summary import hparams

        scores = test_scores(result)
        with writing(self._path):
            for summary in hparams(plain_settings(self._config), scores):
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            for name, value in scores.items():
                summary = self._scalar(name, value)
                self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=summary))
            self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        with writing(self._path):
            self._writer.close()


class Wandb:
    """The same scalars as a run of Weights & Biases, which resumes with the run of the workdir.

    Its id is drawn once and kept in the workdir, in wandb.json. So a new run in an old place is a new one there too.

    Raises:
      ImportError: wandb is not installed.
      Refused: wandb.json is damaged.
    """

    def __init__(self, path: Path, step: int, config: Mapping[str, Any]):
        import wandb

        place = path.resolve()
        self._run = wandb.init(
            project="efficient_tx",
            name=place.name,
            id=self._id(path, step),
            resume="allow",
            dir=place,
            config=dict(config),
        )

    def _id(self, path: Path, step: int) -> str:
        file = path / "wandb.json"
        try:
            return str(read_checked(file).get("id"))
        except FileNotFoundError:
            # A run that an older version began has the id that it gave it, a hash of the path.
            old = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
            identity = old if step else secrets.token_hex(8)
            write_checked(file, {"id": identity})
            return identity
        except (OSError, ValueError) as error:
            raise Refused(f"{file} {error}: delete it, and this run is a new one in W&B") from None

    def write(self, line: Mapping[str, Any]) -> None:
        """Sends one line of metrics.jsonl."""
        values = {f"{line['split']}/{name}": value for name, value in line.items() if name not in ("step", "split")}
        self._run.log(values, step=line["step"])

    def summarise(self, step: int, result: Mapping[str, Any]) -> None:
        """Sends the scores in summary.json; the settings it has from the start."""
        self._run.summary.update(test_scores(result))

    def close(self) -> None:
        """Ends the upload."""
        self._run.finish()


def test_scores(result: Mapping[str, Any]) -> dict[str, float]:
    """The scores on the test split in a summary: {"test/accuracy": ..., "test/last_accuracy": ...}."""
    names = {"test_": "test/", "last_test_": "test/last_"}
    return {
        key.replace(start, name, 1): value
        for start, name in names.items()
        for key, value in result.items()
        if key.startswith(start)
    }


def plain_settings(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The keys of a config with values that TensorBoard can show."""
    flat = {key: value for key, value in flatten(config).items() if value is not None}
    return {key: x if isinstance(x, bool | int | float | str) else str(x) for key, x in flat.items()}


LOGGERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Any]] = {"tensorboard": TensorBoard, "wandb": Wandb}
