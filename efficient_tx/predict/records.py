"""Records: measures of methods in a file, those of finished runs with their final score."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
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
# The error of an attention that is exact up to rounding, in float32.
EXACT = 1e-5

Row = dict[str, Any]


def identity(config: Any, budget: float) -> str:
    """Equal for two measurements that would give the same numbers."""
    keys = {key: repr(x) for key, x in flatten(to_store(config)).items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps([keys, budget], sort_keys=True).encode()).hexdigest()[:16]


def read(path: Path, option: str) -> list[Row]:
    """The rows of a file. Raises OptionError for one that is none."""
    try:
        whole = json.loads(path.read_text())
        # Files of earlier versions say the budget once.
        rows = [{"budget": whole.get("budget")} | row for row in whole["rows"]]
        for row in rows:
            if not isinstance(row["task"], str) or not isinstance(row["method"], str):
                raise TypeError
            if not 0 < row["budget"] <= 1:
                raise ValueError
            for name in (*MEASURES, "final"):
                if row.get(name) is not None and not math.isfinite(row[name]):
                    raise ValueError
    except OSError as error:
        raise OptionError(option, str(path), error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise OptionError(option, str(path), "it holds no measures, as this command writes them") from None
    return rows


def save(path: Path, rows: Sequence[Row]) -> None:
    """Writes the rows, with what they were measured on."""
    write(path, json.dumps({"machine": machine(), "versions": versions(), "rows": list(rows)}, indent=1) + "\n")


def known(rows: Iterable[Row], budget: float) -> list[Known]:
    """The tasks of rows with a final score, those with at least LEAST methods.

    Args:
      budget: the share of the steps after which methods are ranked: of a task that was measured after several, the
        rows of the nearest one, in ratio.
    """
    grouped: dict[str, dict[float, dict[str, Row]]] = {}
    for row in rows:
        if row.get("final") is not None and not row.get("fault"):
            grouped.setdefault(row["task"], {}).setdefault(row["budget"], {})[row["method"]] = row
    result = []
    for task, by_budget in grouped.items():
        distinct = {share: [alike[0] for alike in functions(mine.values())] for share, mine in by_budget.items()}
        enough = [share for share, mine in distinct.items() if len(mine) >= LEAST]
        if enough:
            mine = distinct[min(enough, key=lambda share: abs(math.log(share / budget)))]
            result.append(Known(task, [row["method"] for row in mine], mine, [row["final"] for row in mine]))
    return result


def functions(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of one task, those together that are one function, the one of the least error first."""
    result: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.get("error") or 0):
        # With a budget of all tokens an approximation is the exact function. Of the order that a predictor is learnt
        # from and scored on, several such methods are one: else what it says of that one counts several times.
        alike = next((others for others in result if same(row, others[0])), None)
        if alike is None:
            result.append([row])
        else:
            alike.append(row)
    return result


def same(one: Row, other: Row) -> bool:
    """Whether two models, which start from the same parameters, are one function: both exact, and alike untrained."""
    if any(row.get("error") is None or row["error"] >= EXACT for row in (one, other)):
        return False
    untrained = [(one.get(name), other.get(name)) for name in ("parameters", "gradsign", "alignment")]
    return all(a == b or (a is not None and b is not None and math.isclose(a, b, rel_tol=1e-3)) for a, b in untrained)
