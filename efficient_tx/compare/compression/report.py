"""The results of a comparison of compressions as a table, CSV and JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from efficient_tx.compare.attention.report import ABSENT, csv_text
from efficient_tx.compare.compression.measure import Metric, Row, Settings


def to_json(rows: Sequence[Row], settings: Settings, machine: str) -> str:
    about = asdict(settings) | {"run": str(settings.run)}
    record = {"machine": machine, "settings": about, "rows": [asdict(row) for row in rows]}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """One line for each method and budget."""
    return csv_text([csv_line(row) for row in rows])


def csv_line(row: Row) -> dict:
    line = asdict(row) | {"theory": "; ".join(f"{name} {value:.4g}" for name, value in row.theory.items())}
    line["failed"] = "; ".join(f"{name}: {why}" for name, why in row.failed.items())
    for name in ("scores", "tuned"):
        line[name] = " ".join(f"{score:.4f}" for score in line[name])
    return line


def table(rows: Sequence[Row], settings: Settings, metric: Metric) -> Table:
    """One line for each method and budget; a star for those on the front of bytes and score.

    The last column has what theory says, and why a row or a part of it has no result.
    """
    dense = rows[0]
    found = Table(title=f"{settings.run.name}: {metric.name} of compressed models; *: none is better with as few bytes")
    texts = dense.agreement is not None
    trained = settings.trained or "trained"
    ranks = ("ranks", f"ranks, {trained}") if texts else ()
    columns = ("budget", "method", "bytes kept", metric.name, trained, *ranks, "ms", "time", "ideal", "error", "theory")
    for name in columns:
        found.add_column(name, justify="left" if name in ("method", "theory") else "right", no_wrap=name == "method")
    for row in sorted(rows, key=lambda row: -row.budget):
        name = row.method + (" *" if row.front else "")
        if row.refused is not None:
            found.add_row(f"{row.budget:g}", name, *[ABSENT] * (len(columns) - 3), row.refused)
            continue
        theory = [f"{name} {value:.3f}" for name, value in row.theory.items()]
        failed = [f"{name}: {why}" for name, why in row.failed.items()]
        found.add_row(
            f"{row.budget:g}", name, f"{row.stored / dense.stored:.1%}", spread(row.scores), spread(row.tuned),
            *((number(row.agreement), number(row.tuned_agreement)) if texts else ()),
            f"{row.milliseconds:.1f}", f"{row.milliseconds / dense.milliseconds:.2f}",
            f"{row.multiplications / dense.multiplications:.2f}", f"{row.error:.3f}", "; ".join(theory + failed),
        )  # fmt: skip
    return found


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def spread(scores: Sequence[float]) -> str:
    """The mean, and lowest and highest of several."""
    if not scores:
        return ABSENT
    mean = sum(scores) / len(scores)
    return f"{mean:.4f}" + (f" ({min(scores):.4f} to {max(scores):.4f})" if len(scores) > 1 else "")
