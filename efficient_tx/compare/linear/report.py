"""The results of a comparison of weight structures as tables on a terminal, CSV and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from efficient_tx.compare.attention.report import ABSENT, csv_text, figure, milliseconds
from efficient_tx.compare.linear.measure import Row, Settings
from efficient_tx.compare.timing import PASSES
from efficient_tx.linear import Form


def dense(row: Row, rows: Sequence[Row]) -> Row:
    """The dense layer of the same width as a timed row."""
    return next(other for other in rows if other.structure == "dense" and other.in_features == row.in_features)


def faster(row: Row, rows: Sequence[Row], name: str = "forward_backward") -> float | None:
    """How many times as fast as the dense layer a pass is; None if it was not timed."""
    ours, theirs = row.seconds(name), dense(row, rows).seconds(name)
    return None if ours is None else theirs / ours


def rate(row: Row, rows: Sequence[Row]) -> float | None:
    """Multiplications per second, forward and backward, as a share of the dense layer's."""
    ratio = faster(row, rows)
    return None if ratio is None else ratio * row.multiplies / dense(row, rows).multiplies


def share_stored(row: Row) -> float:
    """Stored bytes as a share of those of a dense float32 layer without a bias."""
    return row.stored / (4 * row.in_features * row.out_features)


def to_json(rows: Sequence[Row], projected: Sequence[Row], source: str, settings: Settings, machine: str) -> str:
    """All results."""
    record = {
        "machine": machine,
        "settings": asdict(settings),
        "timed": [as_record(row) | comparison(row, rows) for row in rows],
        "weight": source,
        "projected": [as_record(row) for row in projected],
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def as_record(row: Row) -> dict[str, Any]:
    """A row as JSON has it; an option that is a structure is its text."""
    options = {key: str(value) if isinstance(value, Form) else value for key, value in row.options.items()}
    return asdict(row) | {"options": options}


def to_csv(rows: Sequence[Row], projected: Sequence[Row]) -> str:
    """One line for each timed row, then for each projected one; milliseconds and bytes; empty if there is no value.

    `error` is that of the projection.
    """
    return csv_text([csv_line(row, rows) for row in rows] + [csv_line(row, ()) for row in projected])


def csv_line(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    about = {
        "structure": row.structure,
        "options": " ".join(f"{key}={value}" for key, value in row.options.items()),
        "packed": row.packed,
        "in_features": row.in_features,
        "out_features": row.out_features,
        "parameters": row.parameters,
        "multiplies": row.multiplies,
        "bytes": row.stored,
    }
    times = {f"{name}_ms": (seconds := row.seconds(name)) and 1e3 * seconds for name in PASSES}
    compared = comparison(row, rows) if rows else dict.fromkeys(comparison_keys())
    return about | times | compared | {"error": row.error}


def comparison_keys() -> list[str]:
    return [*(f"{name}_times_dense" for name in PASSES), "rate_of_dense"]


def comparison(row: Row, rows: Sequence[Row]) -> dict[str, float | None]:
    return dict(zip(comparison_keys(), [*(faster(row, rows, name) for name in PASSES), rate(row, rows)]))


def speed(rows: Sequence[Row], width: int, settings: Settings) -> Table:
    """The table of size and time at one width: milliseconds, and how many times as fast as dense."""
    table = Table(title=f"{width} × {width} without bias, {settings.tokens} tokens, float32")
    table.add_column("structure", no_wrap=True)
    for column in ("parameters", "multiplies", "bytes", "fwd ms", "× dense", "+bwd ms", "× dense", "rate"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        if row.in_features == width:
            times = []
            for name in PASSES:
                ratio = faster(row, rows, name)
                times += [milliseconds(row.cells[name]) if ratio else ABSENT, figure(ratio, ".2f")]
            parameters = f"{row.parameters:,}" if row.parameters else ""
            counts = parameters, f"{row.multiplies:,}", f"{row.stored:,}"
            table.add_row(row.name, *counts, *times, figure(rate(row, rows), ".0%"))
    return table


def errors(projected: Sequence[Row], settings: Settings) -> Table:
    """The table of projection errors."""
    table = Table(title=f"Projection within {settings.share:.0%} of the dense weight's bytes")
    table.add_column("structure", no_wrap=True)
    for column in ("bytes", "of dense", "multiplies", "error"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in projected:
        beyond = "*" if share_stored(row) > settings.share else ""
        table.add_row(
            row.name, f"{row.stored:,}", f"{share_stored(row):.1%}{beyond}", f"{row.multiplies:,}", f"{row.error:.3f}"
        )
    return table


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each structure that multiplies less than a dense layer but is not faster, forward and backward."""
    return [
        f"{row.name}: {row.multiplies / dense(row, rows).multiplies:.0%} of the multiplications of dense "
        f"at {row.in_features} features, {faster(row, rows):.2f} × as fast"
        for row in rows
        if (faster(row, rows) or 2) <= 1 and row.multiplies < dense(row, rows).multiplies
    ]
