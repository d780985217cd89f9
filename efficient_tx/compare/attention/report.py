"""The results of a comparison as tables on a terminal, CSV and JSON, and verdicts on speed."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from efficient_tx.compare.attention.inputs import FAMILIES
from efficient_tx.compare.attention.measure import Row, Settings
from efficient_tx.compare.timing import PASSES, Cell, exponent

# A sub-quadratic variant must be faster than exact softmax from length FASTER_FROM on, and from length GROWTH_FROM on
# its exponent of growth must not exceed MOST_GROWTH.
FASTER_FROM, GROWTH_FROM, MOST_GROWTH = 4096, 1024, 1.15
ABSENT = "—"


def to_json(rows: Sequence[Row], settings: Settings, machine: str) -> str:
    """All results, with predictions for the calls that were not made."""
    variants = [asdict(row) | {"exponent": row.exponent} for row in rows]
    record = {"machine": machine, "settings": asdict(settings), "variants": variants}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """One line for each variant and length; milliseconds and bytes; empty if nothing was measured."""
    return csv_text([line for row in rows for line in csv_lines(row)])


def csv_text(lines: Sequence[Mapping[str, Any]]) -> str:
    """Lines with the same keys in the same order, as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def csv_lines(row: Row) -> list[dict[str, Any]]:
    about = {
        "variant": row.name,
        "cost": row.cost,
        "causal": row.causal,
        "timed": row.timed,
        "parameters": row.parameters,
        "approximates": row.approximates,
        **{f"error_{family}": row.errors.get(family) for family in FAMILIES},
        "exponent": row.exponent,
    }
    return [
        about
        | {"length": length}
        | {f"{name}_ms": cell[name].seconds and 1e3 * cell[name].seconds for name in PASSES}
        | {f"{name}_temporary_bytes": cell[name].temporary_bytes for name in PASSES}
        for length, cell in row.cells.items()
    ]


def properties(rows: Sequence[Row], settings: Settings) -> Table:
    """The table of parameters, cost, causality, errors and growth."""
    table = Table(title=f"Error at length {settings.error_length} and budget {settings.budget}, relative to the exact")
    for column in ("variant", "cost", "causal", "approximates"):
        table.add_column(column, no_wrap=column == "variant")
    for column in (*FAMILIES, "parameters", "exponent"):
        table.add_column(column, justify="right")
    for row in rows:
        exact = row.approximates == row.name
        table.add_row(
            row.name,
            row.cost,
            "yes" if row.causal else "no",
            "is exact" if exact else row.approximates or "",
            *(figure(row.errors.get(family), ".3f") for family in FAMILIES),
            f"{row.parameters:,}",
            figure(row.exponent, ".2f"),
        )
    return table


def speed(rows: Sequence[Row], settings: Settings) -> Table:
    """The table of times by length: milliseconds of forward and of both passes, temporary megabytes of both passes."""
    table = Table(title=f"Batch {settings.batch}, {settings.heads} heads of {settings.head_dim}, float32")
    table.add_column("length\nvariant", no_wrap=True)
    for length in settings.lengths:
        for i, column in enumerate(("fwd ms", "+bwd ms", "MB")):
            table.add_column(f"{length if i == 0 else ''}\n{column}", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name + ("*" if row.timed == "module" else ""), *map(str, speed_cells(row, settings)))
    return table


def speed_cells(row: Row, settings: Settings) -> list[str]:
    out = []
    for length in settings.lengths:
        forward, both = (row.cells[length][name] for name in PASSES)
        out += [milliseconds(forward), milliseconds(both)]
        out.append(ABSENT if both.temporary_bytes is None else f"{both.temporary_bytes / 1e6:.0f}")
    return out


def milliseconds(cell: Cell) -> str:
    """Milliseconds with three digits; `ABSENT` if nothing was run."""
    if cell.seconds is None:
        return ABSENT
    ms = 1e3 * cell.seconds
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def verdicts(rows: Sequence[Row], settings: Settings) -> list[tuple[str, list[str]]]:
    """For each sub-quadratic variant: its speed beside exact softmax, its growth, and what it misses.

    Returns:
      (line, misses) for each variant; a variant without misses meets all requirements.
    """
    baseline = next((row for row in rows if row.name == "softmax"), None)
    lengths = [length for length in settings.lengths if length >= FASTER_FROM]
    found = []
    for row in rows:
        if not row.subquadratic:
            continue
        facts, misses = [], []
        for length in lengths if baseline else []:
            ours = row.cells[length]["forward_backward"].seconds
            theirs = baseline.cells[length]["forward_backward"]
            if ours is None:
                fact = f"too slow for {settings.max_seconds:g} s at {length}"
            else:
                ratio = (theirs.seconds or theirs.predicted) / ours
                fact = f"{ratio:.1f} × as fast as softmax{'' if theirs.seconds else ' (predicted)'} at {length}"
            facts.append(fact)
            if ours is None or ratio <= 1:
                misses.append(fact)
        growth = exponent({length: s for length, s in row.seconds().items() if length >= GROWTH_FROM})
        if growth is not None:
            facts.append(f"exponent {growth:.2f}")
            if growth > MOST_GROWTH:
                misses.append(f"exponent {growth:.2f} > {MOST_GROWTH}")
        if facts:
            found.append((f"{row.name}: {', '.join(facts)}", misses))
    return found
