"""The two plots of a comparison: error against time, and time against length."""

import io
import itertools
from collections.abc import Callable, Iterable, Sequence

# Not pyplot: it has global state and looks for a display.
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from efficient_tx.attention import ATTENTION
from efficient_tx.compare.attention.inputs import FAMILIES
from efficient_tx.compare.attention.measure import Row, Settings
from efficient_tx.compare.labels import label_right

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
    look_of = looks((row.name for row in rows), family_of)
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
    labels, look_of = [], looks((row.name for row in rows), family_of)
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
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="length n; dashed: not sub-quadratic",
        ylabel="milliseconds",
    )
    plain_ticks(axes.yaxis)
    axes.set_xticks(settings.lengths, [str(length) for length in settings.lengths], minor=False)
    axes.set_xticks([], minor=True)
    colours = {family_of(row.name): look_of[row.name]["color"] for row in rows}
    handles = [Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    axes.legend(handles=handles, title="family", fontsize=8, loc="upper left")
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


def looks(names: Iterable[str], family: Callable[[str], str] = str) -> dict[str, dict[str, str]]:
    """A colour for each family and a marker for each name in it, the same in all pictures; no two names share both."""
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(family(name), []).append(name)
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS) + j) % len(MARKERS)]}
        for i, group in enumerate(members.values())
        for j, name in enumerate(group)
    }


def family_of(name: str) -> str:
    """The family of a mixer."""
    return ATTENTION[name].family


def png(figure: Figure) -> bytes:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    return image.getvalue()
