"""Pictures of a report, as SVG: they read without colour, by marks, dashes and names beside the lines."""

import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from efficient_tx.compare.attention.plots import plain_ticks
from efficient_tx.compare.labels import label_right
from efficient_tx.report.budgets import validation
from efficient_tx.report.content import gigabytes, unit
from efficient_tx.report.runs import Problem, Run
from efficient_tx.report.statistics import spread

MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼", "P": "✚", "*": "★", "X": "✖", "<": "◀", ">": "▶"}
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
# Okabe and Ito's colours, told apart by most people who see few.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
INK = "0.15"
WIDTH, HEIGHT = 5.8, 4.0
NAME_HEIGHT = 0.052  # of a name beside a line, as a share of the height of the axes


def look(index: int) -> dict:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": [*MARKS][index % len(MARKS)],
    }


def named(label: str, index: int) -> str:
    """A label with its mark, which tells whose it is without colour."""
    return f"{[*MARKS.values()][index % len(MARKS)]} {label}"


def svg(figure: Figure, name: str) -> str:
    """The picture, with text as text, the same bytes each time, and ids that no other picture has."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    # It fills the width of the page.
    text = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"|<svg ([^>]*?)height="[^"]*" width="[^"]*"',
        r"<svg \1\2",
        text,
        count=1,
    )
    return re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", text)


def scaled(problem: Problem, values: Sequence[float]) -> np.ndarray:
    return np.asarray(values, float) * (100 if problem.metric == "accuracy" else 1)


def lines_to_beat(problem: Problem, axes: Axes, near: Sequence[float] = (), split: str = "") -> None:
    """Draws the answers to beat: all, or those no farther from the scores `near` than these are from each other.

    `split`: what is said of the split, where the axis is of another.
    """
    room = max(near, default=0.0) - min(near, default=0.0)
    for name, value in problem.baselines.items():
        (height,) = scaled(problem, [value])
        if room and not min(near) - room <= height <= max(near) + room:
            continue
        axes.axhline(height, color="0.45", linestyle=(0, (1, 2)), linewidth=1)
        axes.text(
            0.01, height, name + split, transform=axes.get_yaxis_transform(), fontsize=8, color="0.35", va="bottom"
        )


def curves(problem: Problem, order: Sequence[str]) -> Figure:
    """Validation over steps: the mean over seeds, and a band from the lowest to the highest seed.

    `order`: the labels of the whole report, so that a method looks alike in all pictures.
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes, names = figure.subplots(), []
    for method in problem.methods:
        index = order.index(method.label)
        style, seeds = look(index), [validation(run, problem.metric) for run in method.runs]
        seeds = [(steps, scores) for steps, scores in seeds if len(steps)]
        if not seeds:
            continue
        # Steps that the seeds share: of those that are not finished, some have come further.
        shared = sorted(set.intersection(*(set(steps) for steps, _ in seeds))) or sorted(seeds[0][0])
        values = scaled(problem, [np.interp(shared, steps, scores) for steps, scores in seeds])
        mean, every = values.mean(0), max(1, len(shared) // 8)
        axes.plot(shared, mean, linewidth=1.5, markersize=4, markevery=every, **style)
        if len(seeds) > 1:
            axes.fill_between(shared, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)
        names.append((mean[-1], named(method.label, index), INK, shared[-1]))
    lines_to_beat(problem, axes, split=" (test)")
    axes.set(xlabel="step", ylabel=f"validation {unit(problem)}")
    axes.grid(alpha=0.3)
    label_right(axes, names, size=9, gap=NAME_HEIGHT)
    return figure


def against(
    problem: Problem, order: Sequence[str], label: str, cost: Callable[[Run], float | None], *, less_is_better: bool
) -> Figure | None:  # fmt: skip
    """Test score against a cost; `pareto` is filled and joined. None without a score."""
    points = []
    for method in problem.methods:
        costs = [cost(run) for run in method.finished]
        if costs and None not in costs:
            of = spread(scaled(problem, method.scores("test")).tolist())
            points.append((float(np.median(costs)), of, method, order.index(method.label)))
    if not points:
        return None
    sign = 1 if problem.higher_is_better else -1
    best = pareto([(-x if less_is_better else x, sign * of.mean) for x, of, _, _ in points])
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes, names = figure.subplots(), []
    for (x, of, method, index), front in zip(points, best):
        style = look(index)
        axes.errorbar(
            x, of.mean, yerr=of.deviation, marker=style["marker"], color=style["color"], markersize=8,
            markerfacecolor=style["color"] if front else "white", capsize=2, linewidth=1,
        )  # fmt: skip
        names.append((of.mean, named(method.label, index), INK, x))
    front = sorted((x, of.mean) for (x, of, _, _), chosen in zip(points, best) if chosen)
    axes.plot(*zip(*front), color="0.5", linewidth=0.8, zorder=0)
    xs = [x for x, *_ in points]
    if min(xs) > 0 and max(xs) > 3 * min(xs):
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
    axes.margins(0.1)
    lines_to_beat(problem, axes, near=[of.mean for _, of, _, _ in points])
    axes.set(xlabel=label, ylabel=f"test {unit(problem)}")
    axes.grid(alpha=0.3)
    label_right(axes, names, size=9, gap=NAME_HEIGHT)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of each point whether no other is at least as good in both and better in one; more is better in both."""
    return [not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points]


COSTS: Mapping[str, tuple[str, Callable[[Run], float | None], bool]] = {
    "speed": ("training steps a second (more is better)", lambda run: run.figure("steps_per_second"), False),
    "memory": ("peak memory, GB (less is better)", gigabytes, True),
    "parameters": ("parameters (less is better)", lambda run: run.figure("parameters"), True),
}


def pictures(problem: Problem, name: str, order: Sequence[str]) -> dict[str, str]:
    """Caption -> SVG; `name` is part of their ids, `order` the labels of the whole report."""
    made = {}
    if any(len(validation(run, problem.metric)[0]) for method in problem.methods for run in method.runs):
        made["Validation while training: mean, and the range of the seeds"] = svg(
            curves(problem, order), f"{name}-curves"
        )
    for what, (label, cost, less) in COSTS.items():
        figure = against(problem, order, label, cost, less_is_better=less)
        if figure is not None:
            front = "filled: no other method is as good in both and better in one"
            caption = f"Test score against {what}; {front}. Bars: standard deviation"
            made[caption] = svg(figure, f"{name}-{what}")
    return made
