"""A sheet of Pathfinder images: each one plain, and beside it with its contours traced."""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from efficient_tx.commands import Parser
from efficient_tx.files import local_path
from lra.pathfinder import drawing

_COLUMNS = 4


def write(path: pathlib.Path, count: int, resolution: int, contour_length: int, seed: int) -> None:
    """Draws the first `count` images of a seed into `path`, in the format of its suffix; PNG without a suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-count // _COLUMNS)
    figure = Figure(figsize=(4.4 * min(count, _COLUMNS), 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2 * min(count, _COLUMNS), squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for index in range(count):
        drawn = drawing.draw(index, resolution=resolution, contour_length=contour_length, seed=seed)
        plain, traced = grid[2 * index : 2 * index + 2]
        for axes in (plain, traced):
            axes.imshow(drawn.pixels, cmap="gray", vmin=0, vmax=255)
        plain.set_title(f"{index}: label {drawn.label}", fontsize=9)
        traced.set_title("one contour" if drawn.label else "two contours", fontsize=9)
        for contour, colour in zip(drawn.contours, ("tab:orange", "tab:cyan"), strict=True):
            for dash in drawing.ends(contour, resolution, drawn.margin):
                traced.plot(dash[:, 1], dash[:, 0], color=colour, linewidth=1.2)
        for contour in drawn.distractors:
            for dash in drawing.ends(contour, resolution, drawn.margin):
                traced.plot(dash[:, 1], dash[:, 0], color="tab:gray", linewidth=0.8)
        radius = drawing.LOOKS[resolution].marker
        for y, x in drawn.markers:
            circle = np.stack([np.sin(np.linspace(0, 7, 60)), np.cos(np.linspace(0, 7, 60))]) * (radius + 1)
            traced.plot(x + circle[1], y + circle[0], color="tab:red", linewidth=1.2)
    figure.savefig(path, format=path.suffix[1:] or "png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser("python -m lra.pathfinder", description="Draws a contact sheet of generated Pathfinder images.")
    parser.add_argument("--preview", type=local_path, required=True, metavar="FILE.png", help="the picture to write")
    parser.add_argument("--resolution", type=int, default=32, choices=drawing.LOOKS, help="pixels a side (%(default)s)")
    parser.add_argument(
        "--contour_length",
        type=int,
        default=14,
        choices=drawing.CONTOUR_LENGTHS,
        help="dashes of a contour (%(default)s)",
    )
    parser.add_argument("--count", type=int, default=12, help="images (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the generator (%(default)s)")
    options = parser.parse_args(arguments)
    if not (1 <= options.count <= 400 and options.seed >= 0):
        parser.error("--count must be from 1 to 400 and --seed at least 0")
    try:
        write(options.preview, options.count, options.resolution, options.contour_length, options.seed)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.exit(2, f"--preview={options.preview}: {error}\n")
    print(f"{options.preview}: {options.count} images", file=sys.stderr)
