"""Tuning: validation chooses a setting for each cell, from as many runs for every method."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from efficient_tx.sweep.plan import Cell, Grid, Run
from efficient_tx.training import summary


def tuning_runs(grid: Grid, cells: Sequence[Cell], seeds: int) -> list[Run]:
    """The runs of every cell that has a choice, with seeds from 0."""
    return [
        grid.run(cell, point, seed, "tune")
        for cell in cells
        if len(cell.points) > 1
        for point in cell.points
        for seed in range(seeds)
    ]


def final_runs(grid: Grid, cell: Cell, point: Mapping[str, str], seeds: int, first: int) -> list[Run]:
    """The runs of a cell that are compared, with seeds that its tuning did not see."""
    return [grid.run(cell, point, seed, "run") for seed in range(first, first + seeds)]


def choose(
    cell: Cell, runs: Sequence[Run], results: Mapping[str, Mapping[str, Any] | None]
) -> tuple[Mapping[str, str], float] | None:
    """The point with the best mean validation score, the first one of equals, and that score.

    Args:
      cell: whose points are compared.
      runs: of the tuning.
      results: name of a run -> its summary, or None for one that diverged: its point is out. A run that is absent did
        not end, and then there is no choice yet.

    Returns:
      None if a run did not end, or every point is out.
    """
    mine = [run for run in runs if run.cell is cell]
    if any(run.name not in results for run in mine):
        return None
    scores, sign = [], 1
    for point in cell.points:
        ended = [results[run.name] for run in mine if all(run.settings[key] == point[key] for key in point)]
        if all(ended):
            sign = 1 if summary.higher_is_better(ended[0]) else -1
            scores.append((point, statistics.fmean(result[f"val_{summary.metric(result)}"] for result in ended)))
    return max(scores, key=lambda scored: sign * scored[1], default=None)
