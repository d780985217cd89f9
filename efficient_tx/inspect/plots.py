"""The picture of what is inside a run: profiles and errors by layer."""

from collections.abc import Mapping, Sequence

import numpy as np

# Not pyplot: it has global state and looks for a display.
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from efficient_tx.compare.attention.plots import COLOURS, MARKERS, png
from efficient_tx.inspect.look import Look

# Heads and weights that a legend names; others are drawn.
NAMED = 12
# On a logarithmic axis: float32 resolves nothing below this.
ROUNDING = 1e-7


def overview(found: Look, title: str) -> bytes:
    """PNG: errors by budget, singular values of q·kᵀ and of the weights, leverage scores, nuclear norms."""
    figure = Figure(figsize=(16, 10), layout="constrained")
    figure.suptitle(title, fontsize=10, parse_math=False)
    panels = figure.subplots(2, 3).ravel()
    by_layer = {one.name: one for one in found.layers}
    swept = {
        f"{variant}, {short(one.name)}": sorted(
            (size, max(max(heads), ROUNDING)) for size, heads in by_size.items() if heads is not None
        )
        for one in found.layers
        for variant, by_size in one.errors.items()
    }
    curves(panels[0], "Error of the worst head by budget", "budget", "‖out − exact‖ / ‖exact‖",
           {name: tuple(zip(*points)) for name, points in swept.items() if points})  # fmt: skip
    own = {short(name): one.error for name, one in by_layer.items() if one.error is not None}
    bars(panels[1], "Error of the run's own mixers", own)
    heads = {
        f"{short(name)}, head {i}": (range(1, len(head) + 1), np.maximum(head, ROUNDING))
        for name, one in by_layer.items()
        for i, head in enumerate(one.logits or [])
    }
    curves(panels[2], "Singular values of q·kᵀ", "number", "over the Frobenius norm", heads)
    spectra = {
        name: (range(1, len(values) + 1), np.maximum(np.divide(values, max(values[0], 1e-30)), ROUNDING))
        for name, values in found.weights.items()
    }
    curves(panels[3], "Singular values of the weights", "number", "over the largest", spectra)
    shares = {
        f"{short(name)}, head {i}": (one.leverage["keys"], share)
        for name, one in by_layer.items()
        for i, share in enumerate(one.leverage["share"] if one.leverage else [])
    }
    curves(panels[4], "Leverage scores of the keys", "keys of the highest scores", "share of all scores", shares)
    bars(panels[5], "Matrix Nuclear-Norm per token after each block", {short(n): [v] for n, v in found.states.items()})
    return png(figure)


def short(name: str) -> str:
    """The path of a mixer or block without what all of them share."""
    return name.removeprefix("encoder.").removesuffix(".mixer")


def curves(axes: Axes, title: str, x: str, y: str, lines: Mapping[str, tuple[Sequence, Sequence]]) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    if not lines:
        absent(axes)
        return
    for i, (name, (places, heights)) in enumerate(lines.items()):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]}
        axes.plot(places, heights, markersize=4, linewidth=1, label=name if i < NAMED else None, **look)
    axes.set(xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    more = f"and {len(lines) - NAMED} more" if len(lines) > NAMED else None
    axes.legend(fontsize=7, title=more, title_fontsize=7)


def bars(axes: Axes, title: str, groups: Mapping[str, Sequence[float]]) -> None:
    """A group of bars for each name, one bar a head."""
    axes.set(title=title)
    if not groups:
        absent(axes)
        return
    for place, heights in enumerate(groups.values()):
        width = 0.8 / len(heights)
        at = place + (np.arange(len(heights)) - (len(heights) - 1) / 2) * width
        axes.bar(at, heights, width=0.9 * width, color=[COLOURS[i % len(COLOURS)] for i in range(len(heights))])
    axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right", fontsize=8)
    axes.grid(alpha=0.3, axis="y")


def absent(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="#666")
