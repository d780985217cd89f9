"""The plots of a comparison of weight structures: speed against multiplications, projection error against bytes."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from efficient_tx.compare.attention.plots import looks, plain_ticks, png
from efficient_tx.compare.labels import label_right
from efficient_tx.compare.linear.measure import Row, Settings
from efficient_tx.compare.linear.report import dense, faster, share_stored


def gains_and_losses(
    rows: Sequence[Row], projected: Sequence[Row], source: str, settings: Settings, machine: str
) -> bytes:
    """PNG: left, speed against multiplications, a dot for each width; right, projection error against bytes."""
    figure = Figure(figsize=(15, 7), layout="constrained")
    about = f"Weight structures, {settings.tokens} tokens, float32\n{machine}\n{textwrap.fill(source, 150)}"
    figure.suptitle(about, fontsize=10)
    left, right = figure.subplots(1, 2)
    structures = dict.fromkeys(row.structure for row in (*rows, *projected))
    look_of = looks(structures)
    speed(left, rows, settings, look_of)
    errors(right, projected, look_of)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return png(figure)


def speed(axes: Axes, rows: Sequence[Row], settings: Settings, look_of: dict[str, dict[str, str]]) -> None:
    timed = [row for row in rows if faster(row, rows) and row.structure != "dense"]
    by_width = [[row for row in timed if row.in_features == width] for width in settings.features]
    labels, shares = [], []
    for case in zip(*by_width):
        points = [(row.multiplies / dense(row, rows).multiplies, faster(row, rows)) for row in case]
        look = look_of[case[-1].structure]
        axes.plot(*zip(*points), markersize=6, linewidth=0.8, markerfacecolor="white", **look)
        axes.plot(*points[-1], linestyle="none", markersize=6, **look)
        labels.append((points[-1][1], case[-1].name, look["color"], points[-1][0]))
        shares += [share for share, _ in points]
    if shares:
        ends = min(shares), max(*shares, 1)
        axes.plot(ends, [1 / end for end in ends], color="black", linestyle=":", linewidth=1)
        axes.text(ends[0], 1 / ends[0], "at the rate of dense ", fontsize=8, ha="left", va="bottom")
    axes.axhline(1, color="black", linewidth=0.8)
    *narrower, widest = settings.features
    hollow = f" (hollow: {', '.join(map(str, narrower))})" if narrower else ""
    axes.set(xscale="log", yscale="log", xlabel="multiplications, share of dense", ylabel="times as fast as dense",
             title=f"Forward and backward at {widest} features{hollow}")  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        plain_ticks(axis)
    label_right(axes, labels)


def errors(axes: Axes, projected: Sequence[Row], look_of: dict[str, dict[str, str]]) -> None:
    labels = []
    for row in projected:
        look, place = look_of[row.structure], share_stored(row)
        axes.plot(place, row.error, linestyle="none", markersize=7, **look)
        labels.append((row.error, row.name, look["color"], place))
    axes.set(xscale="log", ylim=(0, 1), xlabel="bytes, share of dense", ylabel="‖W − Ŵ‖ / ‖W‖", title="Projection of W")
    plain_ticks(axes.xaxis)
    label_right(axes, labels)
