"""The results of decoding as a table on a terminal, CSV and JSON, and verdicts on what stays constant."""

import json
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from efficient_tx.compare.attention.report import ABSENT, csv_text
from efficient_tx.compare.decode.measure import Row, Settings

# A mixer whose state does not grow takes at most so many times as long for a token after the longest context as after
# the shortest one: the rest is what a busy machine adds.
MOST_GROWTH = 1.5


def to_json(rows: Sequence[Row], settings: Settings, machine: str) -> str:
    record = {"machine": machine, "settings": asdict(settings), "mixers": [asdict(row) for row in rows]}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """One line for each mixer and length; bytes, microseconds and milliseconds."""
    lines = []
    for row in rows:
        for length, size in row.state_bytes.items():
            token, prefill = row.token[length].seconds, row.prefill[length].seconds
            about = {"mixer": row.name, "cost": row.cost, "length": length, "state_bytes": size}
            lines.append(about | {"token_us": token and 1e6 * token, "prefill_ms": prefill and 1e3 * prefill})
    return csv_text(lines)


def table(rows: Sequence[Row], settings: Settings) -> Table:
    """State, time of a token and of a prompt, by length of the context."""
    found = Table(title=f"Batch {settings.batch}, {settings.heads} heads of {settings.head_dim}, float32")
    found.add_column("context\nmixer", no_wrap=True)
    for length in settings.lengths:
        for i, column in enumerate(("state KB", "token µs", "prompt ms")):
            found.add_column(f"{thousands(length) if i == 0 else ''}\n{column}", justify="right", no_wrap=True)
    for row in rows:
        cells = []
        for length in settings.lengths:
            token, prefill = row.token[length].seconds, row.prefill[length].seconds
            cells += [digits(row.state_bytes[length] / 1024), digits(token and 1e6 * token)]
            cells.append(digits(prefill and 1e3 * prefill))
        found.add_row(row.name, *cells)
    return found


def verdicts(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """For each mixer whose state is bounded: how the time of a token grew, and whether it counts as constant."""
    found = []
    for row in rows:
        seconds = row.seconds("token")
        if row.bounded and len(seconds) > 1:
            (shortest, first), *_, (longest, last) = seconds.items()
            line = f"{row.name}: a token after {thousands(longest)} takes {last / first:.2f} times that after "
            found.append((line + f"{thousands(shortest)}; {digits(row.state_bytes[longest] / 1024)} KB",
                          last <= MOST_GROWTH * first))  # fmt: skip
    return found


def thousands(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def digits(value: float | None) -> str:
    """Three digits, or what stands for nothing."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
