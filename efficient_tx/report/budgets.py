"""Budgets: what methods reach after equal steps, equal training time and equal floating-point operations."""

from collections.abc import Sequence

import numpy as np

from efficient_tx.report.flops import Costs, used
from efficient_tx.report.runs import Method, Run

# Of the largest amount that every method has come to.
SHARES = (0.25, 0.5, 1.0)


def validation(run: Run, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and scores of a run's evaluations."""
    points = {line["step"]: line[metric] for line in run.lines if line["split"] == "validation" and metric in line}
    points = {step: score for step, score in sorted(points.items()) if score is not None}
    return np.array([*points], float), np.array([*points.values()], float)


def seconds_at(run: Run, steps: np.ndarray) -> np.ndarray:
    """Training time until each step, evaluation, saving and compilation aside, between train lines by interpolation.

    A line's steps all took what its own speed says: its seconds leave out what was trained before a run was resumed.
    """
    lines = [line for line in run.lines if line["split"] == "train"]
    at = np.array([0, *(line["step"] for line in lines)], float)
    examples = np.diff(at) * run.config["batch_size"]
    rates = [line.get("examples_per_second") for line in lines]
    seconds = [count / rate if rate else line["seconds"] or 0.0 for count, rate, line in zip(examples, rates, lines)]
    return np.interp(steps, at, np.cumsum([0, *seconds]))


def amounts(run: Run, what: str, metric: str, flops: Costs, label: str) -> np.ndarray | None:
    """What a run had used at each of its evaluations; None if it is not known."""
    steps, _ = validation(run, metric)
    if what == "steps":
        return steps
    if what == "seconds":
        return seconds_at(run, steps)
    return None if flops.get(label) is None else used(flops[label], steps)


def at_equal(
    methods: Sequence[Method], what: str, metric: str, flops: Costs
) -> tuple[list[float], dict[str, list[list[float]]]]:
    """Validation scores after equal amounts of "steps", "seconds" or "flops".

    Args:
      flops: label of a method -> floating-point operations of its steps, None if unknown.

    Returns:
      The amounts, and label -> for each amount the scores of the runs that have come so far, linear between two
      evaluations; a method whose amounts are unknown, or that has no evaluation, is absent.
    """
    curves, ends = {}, []
    for method in methods:
        mine = {
            run: (amounts(run, what, metric, flops, method.label), validation(run, metric)[1]) for run in method.runs
        }
        mine = {run: (amount, scores) for run, (amount, scores) in mine.items() if amount is not None and len(amount)}
        if mine:
            curves[method.label] = list(mine.values())
            # All finished runs are to be in the table; of others the one that has come furthest.
            last = [amount[-1] for run, (amount, _) in mine.items() if run in method.finished]
            ends.append(min(last) if last else max(amount[-1] for amount, _ in mine.values()))
    ends = [end for end in ends if end > 0]  # a compressed run that was not trained has used nothing
    if not ends:
        return [], {}
    common = min(ends)
    marks = [share * common for share in SHARES]
    # A run's own last amount may be common only up to rounding.
    return marks, {
        label: [
            [
                float(np.interp(mark, amount, scores))
                for amount, scores in mine
                if amount[0] <= mark <= amount[-1] * (1 + 1e-9)
            ]
            for mark in marks
        ]
        for label, mine in curves.items()
    }
