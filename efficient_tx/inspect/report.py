"""What was found inside a run, as tables on a terminal, lines, and JSON."""

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from efficient_tx.inspect.errors import TARGETS
from efficient_tx.inspect.look import Advice, Look
from efficient_tx.inspect.profiles import rank_within

ABSENT = "—"
# Significant digits of a number in the JSON file.
DIGITS = 5


def to_json(found: Look, advised: Sequence[Advice], about: dict[str, Any]) -> str:
    record = about | asdict(found)
    if advised:
        record["advice"] = [asdict(one) for one in advised]
    return json.dumps(rounded(record), ensure_ascii=False, allow_nan=False) + "\n"


def rounded(value: Any) -> Any:
    """A record with its floats rounded to `DIGITS`, those that are not finite as None, and its keys as text."""
    if isinstance(value, dict):
        return {f"{key:g}" if isinstance(key, float) else str(key): rounded(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def mixers(found: Look) -> Table:
    """A row for each mixer; cells with several numbers are by head."""
    table = Table(title=f"Mixers, on {found.tokens:,} tokens: {lengths(found)}; numbers by head")
    for name in (
        "layer",
        "mixer",
        "error against exact",
        "rank of q·kᵀ\nwithin 10 %",
        "keys with half\nof the leverage",
    ):
        table.add_column(name, overflow="fold")
    for one in found.layers:
        error = ABSENT if one.error is None else "exact" if one.mixer == one.exact else figures(one.error)
        table.add_row(
            one.name,
            one.mixer,
            error if one.exact in (None, one.mixer) else f"{one.exact}: {error}",
            ABSENT if one.logits is None else " ".join(str(rank_within(head, 0.1)) for head in one.logits),
            ABSENT if one.leverage is None else " ".join(map(str, halves(one.leverage))),
        )
    return table


def lengths(found: Look) -> str:
    """How long the sequences are: an error within a budget says little where they are shorter than that."""
    return f"{found.length:.1f} real tokens in the mean of {found.sequences} sequences"


def halves(leverage: dict[str, Any]) -> list[int]:
    """By head, the first of the counts of keys whose scores are at least half of all."""
    return [next(n for n, share in zip(leverage["keys"], head) if share >= 0.5) for head in leverage["share"]]


def states(found: Look) -> Table:
    """A row for each weight and, with them, the hidden states after each block."""
    table = Table(title="Rank of the weights within 10 %, and Matrix Nuclear-Norm per token after each block")
    table.add_column("weight or block", overflow="fold")
    table.add_column("rank", justify="right")
    table.add_column("nuclear norm", justify="right")
    for name, values in found.weights.items():
        table.add_row(name, f"{rank_within(values, 0.1)} of {len(values)}", "")
    for name, value in found.states.items():
        table.add_row(name, "", f"{value:.4f}")
    return table


def errors(found: Look) -> Table:
    """A row for each layer and variant, and a column for each size."""
    sizes = sorted({size for one in found.layers for by_size in one.errors.values() for size in by_size})
    table = Table(title=f"Relative error within a budget, by head; {lengths(found)}")
    table.add_column("variant")
    table.add_column("layer", overflow="fold")
    for size in sizes:
        table.add_column(str(size), justify="right")
    for variant, one in by_variant(found):
        cells = [one.errors[variant].get(size) for size in sizes]
        table.add_row(variant, one.name, *(ABSENT if cell is None else figures(cell) for cell in cells))
    return table


def budgets(found: Look) -> Table:
    """The smallest budgets for each target, and the rank below which no low-rank attention gets."""
    table = Table(title=f"Smallest budget for an error, by head; {lengths(found)}")
    table.add_column("variant")
    table.add_column("layer", overflow="fold")
    for target in TARGETS:
        table.add_column(f"{target:.0%}", justify="right")
    for variant, one in by_variant(found):
        if variant in one.budgets:
            table.add_row(variant, one.name, *(wholes(one.budgets[variant][target]) for target in TARGETS))
    for one in found.layers:
        if one.ranks is not None:
            table.add_row("rank of the attention", one.name, *(wholes(one.ranks[target]) for target in TARGETS))
    return table


def by_variant(found: Look) -> Iterable[tuple[str, Any]]:
    for variant in dict.fromkeys(name for one in found.layers for name in one.errors):
        yield from ((variant, one) for one in found.layers if variant in one.errors)


def figures(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def wholes(values: Sequence[int | None]) -> str:
    return " ".join(ABSENT if value is None else str(value) for value in values)


def lines(advised: Sequence[Advice]) -> list[str]:
    """The flags that apply each budget."""
    if not advised:
        return ["no layer of the run has an approximation with a budget"]
    made = ["for eval.py, or python -m efficient_tx.compress, whose --mixers is the first of them:"]
    for one in advised:
        head = f"{one.variant}, {one.target:.0%}:"
        if one.size is None:
            made.append(f"{head} no measured size is enough in all layers and heads")
        else:
            made.append(
                f"{head} --set {' '.join(shlex.quote(f'{key}={value}') for key, value in one.settings.items())}"
            )
    return made
