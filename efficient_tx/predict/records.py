"""Records: measures of methods in a file, those of finished runs with their final score."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from efficient_tx.checks import OptionError
from efficient_tx.compare.timing import machine
from efficient_tx.config.stored import to_store
from efficient_tx.files import write
from efficient_tx.predict.measures import MEASURES
from efficient_tx.predict.ranking import Known
from efficient_tx.training.summary import versions
from efficient_tx.training.workdir import FREE_KEYS, flatten

SHIPPED = Path(__file__).with_name("known.json")
# Fewer methods of a task have no order to speak of.
LEAST = 3

Row = dict[str, Any]


def identity(config: Any, budget: float) -> str:
    """Equal for two measurements that would give the same numbers."""
    keys = {key: repr(x) for key, x in flatten(to_store(config)).items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps([keys, budget], sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path, option: str) -> list[Row]:
    """The rows of a file. Raises OptionError for one that is none."""
    try:
        rows = json.loads(path.read_text())["rows"]
        for row in rows:
            if not isinstance(row["task"], str) or not isinstance(row["method"], str):
                raise TypeError
            for name in (*MEASURES, "final"):
                if row.get(name) is not None and not math.isfinite(row[name]):
                    raise ValueError
    except OSError as error:
        raise OptionError(option, str(path), error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OptionError(option, str(path), "it holds no measures, as this command writes them") from None
    return rows


def save(path: Path, rows: Sequence[Row], budget: float) -> None:
    """Writes the rows, with what they were measured on."""
    about = {"budget": budget, "machine": machine(), "versions": versions()}
    write(path, json.dumps({**about, "rows": list(rows)}, indent=1) + "\n")


def known(rows: Iterable[Mapping[str, Any]]) -> list[Known]:
    """The tasks of rows with a final score, those with at least LEAST methods."""
    grouped: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("final") is not None and not row.get("fault"):
            grouped.setdefault(row["task"], {})[row["method"]] = row
    return [
        Known(task, [*mine], [*mine.values()], [row["final"] for row in mine.values()])
        for task, mine in grouped.items()
        if len(mine) >= LEAST
    ]
