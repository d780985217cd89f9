"""A sheet of Pathfinder images: each as a model sees it, and beside it with its contours traced."""

import pathlib

import numpy as np

from lra import snakes

_COLUMNS = 4


def write(path: pathlib.Path, count: int, resolution: int, contour_length: int, seed: int) -> None:
    """Draws the first `count` images of a seed into `path`, whose ending says the format; PNG if there is none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-count // _COLUMNS)
    figure = Figure(figsize=(4.4 * min(count, _COLUMNS), 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2 * min(count, _COLUMNS), squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for index in range(count):
        drawing = snakes.draw(index, resolution=resolution, contour_length=contour_length, seed=seed)
        plain, traced = grid[2 * index : 2 * index + 2]
        for axes in (plain, traced):
            axes.imshow(drawing.pixels, cmap="gray", vmin=0, vmax=255)
        plain.set_title(f"{index}: label {drawing.label}", fontsize=9)
        traced.set_title("one contour" if drawing.label else "two contours", fontsize=9)
        for contour, colour in zip(drawing.contours, ("tab:orange", "tab:cyan"), strict=True):
            for dash in snakes.ends(contour, resolution, drawing.margin):
                traced.plot(dash[:, 1], dash[:, 0], color=colour, linewidth=1.2)
        for contour in drawing.distractors:
            for dash in snakes.ends(contour, resolution, drawing.margin):
                traced.plot(dash[:, 1], dash[:, 0], color="tab:gray", linewidth=0.8)
        radius = snakes.LOOKS[resolution].marker
        for y, x in drawing.markers:
            circle = np.stack([np.sin(np.linspace(0, 7, 60)), np.cos(np.linspace(0, 7, 60))]) * (radius + 1)
            traced.plot(x + circle[1], y + circle[0], color="tab:red", linewidth=1.2)
    figure.savefig(path, format=path.suffix[1:] or "png", dpi=110)
