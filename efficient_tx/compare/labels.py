"""Names beside the right border of a plot, moved apart where they would overlap."""

from collections.abc import Sequence

# Not pyplot: it has global state and looks for a display.
from matplotlib.axes import Axes


def label_right(
    axes: Axes, labels: Sequence[tuple[float, str, str, float]], *, size: float = 8, gap: float = 0.024
) -> None:
    """Writes names beside the right border, at the height of their points or as near as they do not overlap.

    Args:
      labels: (y, text, colour, x) each, in the coordinates of the data.
      size: of the letters, in points.
      gap: between two names, as a share of the height of the axes.
    """
    if not labels:
        return
    labels = sorted(labels)
    # Fixes the limits: names must stay at the height of their points.
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [to_axes.transform((x, y))[1] for y, _, _, x in labels]
    for (y, text, colour, x), height in zip(labels, spread(heights, gap)):
        axes.annotate(
            text, (x, y), xytext=(1.03, height), textcoords="axes fraction", fontsize=size, color=colour, va="center",
            parse_math=False, arrowprops={
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
