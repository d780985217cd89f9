"""The two plots of a comparison: error against time, and time against length."""

import io
import itertools
from collections.abc import Iterable, Sequence

# Not pyplot: it has global state and looks for a display.
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from efficient_tx.compare.attention.inputs import FAMILIES
from efficient_tx.compare.attention.measure import Row, Settings

COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"]
MARKERS = "osD^vP*X<>"
# Smallest error that is drawn: a logarithmic axis has no zero, and float32 resolves nothing below this.
ROUNDING = 1e-7


def error_against_time(rows: Sequence[Row], settings: Settings, machine: str) -> bytes:
    """PNG: a panel for each family of inputs, with a point for each approximation and a line for each exact method."""
    figure = Figure(figsize=(5 * len(FAMILIES), 6), layout="constrained")
    length = settings.error_length
    timed = [row for row in rows if row.errors and length in row.seconds()]
    others = [
        f"{row.name}'s against {row.approximates}" for row in timed if row.approximates not in (row.name, "softmax")
    ]
    figure.suptitle(
        f"Error against time at length {length}, {sizes(settings)}, by family of inputs\n"
        f"errors are against softmax{''.join(f', {other}' for other in others)}\n{machine}",
        fontsize=10,
    )
    panels = dict(zip(FAMILIES, figure.subplots(1, len(FAMILIES), sharex=True, sharey=True)))
    labels = {family: [] for family in FAMILIES}
    exact = sorted((row for row in timed if row.approximates == row.name), key=lambda row: row.seconds()[length])
    look_of = looks(row.name for row in rows)
    for (family, axes), row in itertools.product(panels.items(), timed):
        ms, look = 1e3 * row.seconds()[length], look_of[row.name]
        if row in exact:
            axes.axvline(ms, color=look["color"], linestyle=":", linewidth=1)
            # One above the other: exact methods take similar times.
            axes.text(ms, 0.02 + 0.25 * exact.index(row), f"{row.name} (exact)", color=look["color"], fontsize=8,
                      rotation=90, ha="right", va="bottom", transform=axes.get_xaxis_transform())  # fmt: skip
        else:
            error = max(row.errors[family], ROUNDING)
            axes.plot(ms, error, linestyle="none", markersize=7, **look)
            labels[family].append((error, row.name, look["color"], ms))
    for family, axes in panels.items():
        axes.set(xscale="log", yscale="log", xlabel="forward + backward, ms", title=family)
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):
            plain_ticks(axis)
    for family, axes in panels.items():
        label_right(axes, labels[family])
    panels[next(iter(FAMILIES))].set_ylabel("‖out − exact‖ / ‖exact‖")
    return png(figure)


def time_against_length(rows: Sequence[Row], settings: Settings, machine: str) -> bytes:
    """PNG, log-log: forward and backward of every variant, labelled with the fitted exponent.

    If a call would be too slow, a dotted line leads to the predicted time.
    """
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(f"Forward and backward, {sizes(settings)}\n{machine}", fontsize=10)
    labels, look_of = [], looks(row.name for row in rows)
    for row in rows:
        seconds = row.seconds()
        if not seconds:
            continue
        look, growth = look_of[row.name], "" if row.exponent is None else f"  n^{row.exponent:.2f}"
        points = [(length, 1e3 * s) for length, s in seconds.items()]
        axes.plot(*zip(*points), markersize=5, linewidth=1.2, linestyle="-" if row.subquadratic else "--", **look)
        end = points[-1]
        beyond = [length for length in settings.lengths if length > end[0]]
        if beyond:
            predicted = (beyond[0], 1e3 * row.cells[beyond[0]]["forward_backward"].predicted)
            axes.plot(*zip(end, predicted), markersize=5, linewidth=1, linestyle=":", markerfacecolor="white",
                      markevery=[1], **look)  # fmt: skip
            end, growth = predicted, f"{growth} (predicted)"
        labels.append((end[1], row.name + growth, look["color"], end[0]))
    axes.set(xscale="log", yscale="log", xlabel="length n; dashed: not sub-quadratic", ylabel="milliseconds")
    plain_ticks(axes.yaxis)
    axes.set_xticks(settings.lengths, [str(length) for length in settings.lengths], minor=False)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    label_right(axes, labels)
    return png(figure)


def sizes(settings: Settings) -> str:
    return f"batch {settings.batch}, {settings.heads} heads of {settings.head_dim}, budget {settings.budget}"


def plain_ticks(axis: Axis) -> None:
    """Ticks 1, 2, 5, 10 ... in digits, on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def looks(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """A colour and a marker for each name, the same in all pictures of a comparison."""
    pairs = ((colour, marker) for shift in itertools.count() for i, colour in enumerate(COLOURS)
             for marker in [MARKERS[(i + shift) % len(MARKERS)]])  # fmt: skip
    return {name: {"color": colour, "marker": marker} for name, (colour, marker) in zip(names, pairs)}


def label_right(axes: Axes, labels: Sequence[tuple[float, str, str, float]]) -> None:
    """Writes names beside the right border, at the height of their points or as near as they do not overlap.

    Args:
      labels: (y, text, colour, x) each, in the coordinates of the data.
    """
    if not labels:
        return
    labels = sorted(labels)
    # Fixes the limits: names must stay at the height of their points.
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((x, y))[1] for y, _, _, x in labels]
    for (y, text, colour, x), height in zip(labels, spread(heights, 0.024)):
        axes.annotate(
            text, (x, y), xytext=(1.03, height), textcoords="axes fraction", fontsize=8, color=colour, va="center",
            arrowprops={
                "arrowstyle": "-", "color": colour, "alpha": 0.35, "linewidth": 0.7, "shrinkB": 4, "relpos": (0, 0.5)
            },
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights, moved until all are at least `gap` apart.

    Heights that are too close form a group around their mean; groups that meet merge.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and bounds(groups[-1], gap)[0] - bounds(groups[-2], gap)[1] < gap:
            last = groups.pop()
            groups[-1] += last
    return [bounds(group, gap)[0] + i * gap for group in groups for i in range(len(group))]


def bounds(group: Sequence[float], gap: float) -> tuple[float, float]:
    """The lowest and the highest place of a group spread around its mean, moved into [0, 1] if it fits."""
    half = gap * (len(group) - 1) / 2
    middle = max(min(sum(group) / len(group), 1 - half), half)
    return middle - half, middle + half


def png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
