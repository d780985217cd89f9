"""Record: sweep.json, which lists the runs of a folder and what tuning chose there, of all sweeps of that folder."""

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from efficient_tx.files import write
from efficient_tx.training.disk import decode

NAME = "sweep.json"
LOCK = "sweep.lock"


def read(out: Path) -> dict[str, dict[str, Any]]:
    """`runs` and `chosen` of the record in a folder; empty if there is none.

    Raises:
      ValueError: it is damaged.
    """
    try:
        content = decode((out / NAME).read_bytes())
        parts = {part: content.get(part) for part in ("runs", "chosen")}
        for part, value in parts.items():
            if not isinstance(value, dict):
                raise ValueError(f"it has no {part}")
    except (FileNotFoundError, NotADirectoryError):
        return {"runs": {}, "chosen": {}}
    except ValueError as error:
        remedy = "restore it, or move it away: what earlier sweeps of the folder chose is then forgotten"
        raise ValueError(f"{out / NAME} is damaged ({error}): {remedy}") from None
    return parts


def add(out: Path, config: str, runs: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """Adds runs and choices to the record in a folder, to which other sweeps may be adding theirs.

    Raises:
      OSError: it cannot be written.
      ValueError: as `read`.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        before = read(out)
        content = {"config": config, "chosen": {**before["chosen"], **chosen}, "runs": {**before["runs"], **runs}}
        write(out / NAME, json.dumps(content, indent=1) + "\n")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Waits for the folder's lock and holds it; the kernel frees it however the holder ends."""
    with open(out / LOCK, "a") as file:
        with contextlib.suppress(OSError):  # a file system without locks: the last one of two sweeps wins
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
