"""Estimate: the table of what low rank at a budget would leave of a run's layers. Nothing is written."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from efficient_tx.compress.result import become
from efficient_tx.compression.estimate import Estimates, estimate
from efficient_tx.config.trained import trained_run
from efficient_tx.linear.replacement import dotted
from efficient_tx.training.errors import Refused


def show(workdir: Path, checkpoint: str, budget: float, where: str, unit: str, console: Console) -> None:
    """Prints the estimates; the arguments are as in `Asked`.

    Raises:
      RunError: the run cannot be read, `where` selects none of its layers, or low rank cannot meet the budget.
    """
    *_, model, _ = trained_run(workdir, checkpoint)
    try:
        found = estimate(model, budget, where=where, unit=unit)
    except ValueError as error:
        raise Refused.of(error) from None
    console.print(table(found, unit))
    console.print(
        "error: ‖W − D U‖ / ‖W‖ as a sketch sees it; the true one is up to 2 times as large, 3 near full rank"
    )


def table(found: Estimates, unit: str) -> Table:
    """Layer, rank and estimate; in the title the cost of all of them."""
    result = Table(title=f"{len(found.layers)} layers: {become(found.before, found.after, unit)}")
    for name in ("layer", "becomes", "error, at least about"):
        result.add_column(name, justify="right" if name.startswith("error") else "left")
    for layer in found.layers:
        becomes = "dense" if layer.rank is None else f"low_rank(rank={layer.rank})"
        result.add_row(dotted(layer.path), becomes, f"{layer.left:.2f}")
    return result
