"""Published accuracies of Long Range Arena, in percent, by protocol: published.json, each with its source."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple


class Published(NamedTuple):
    """Figures of one protocol on one task.

    Attributes:
      source: where they stand.
      note: what one must know to read them.
      ours: our name of a mixer -> accuracy in percent.
      others: published name -> accuracy in percent, of methods that are not here.
    """

    source: str
    note: str
    ours: dict[str, float]
    others: dict[str, float]


@functools.cache
def _stored() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("published.json").read_text())


def published(protocol: str, task: str) -> Published | None:
    """The figures of a protocol on the task with this `protocols.key`; None if there are none."""
    stored = _stored().get(protocol)
    if stored is None:
        return None
    found = {name: row for name, row in stored["methods"].items() if task in row["accuracy"]}
    if not found:
        return None
    ours = {row["mixer"]: row["accuracy"][task] for row in found.values() if row["mixer"]}
    others = {name: row["accuracy"][task] for name, row in found.items() if not row["mixer"]}
    return Published(stored["source"], stored["note"], ours, others)
