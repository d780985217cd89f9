"""Picture of what the tokens of an example read, and of the landmarks or keys that are chosen, on the image or text."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib import patheffects

# Not pyplot: it has global state and looks for a display.
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from efficient_tx.compare.attention.plots import png
from efficient_tx.inspect.example import Example
from efficient_tx.inspect.look import Layer, Look
from efficient_tx.inspect.plots import short

# Tokens of a text that are one line, with a few queries below; a longer one is set in lines of COLUMNS.
LINE, COLUMNS = 96, 64
# Of a picture of texts, in inches: more heads are left to the JSON file.
TALLEST = 200
# Of a token that is chosen from a projection: hollow, so that what is below can be read.
MARKS = {"q": "o", "k": "s"}
OTHER = "D"


def attention(found: Look, example: Example, title: str) -> bytes | None:
    """PNG: how much each token of the example is read, and what is chosen, head by head; None if no mixer has rows."""
    layers = [one for one in found.layers if one.attention]
    if not layers:
        return None
    tokens = max(len(one.attention["received"][0]) for one in layers)
    grids = example.picture is not None and all(side_of(len(one.attention["received"][0])) for one in layers)
    heads = max(len(one.attention["received"]) for one in layers)
    if grids:
        shown, columns, size = heads, heads, (2.8, 3.0)
    else:
        # Heads below each other: a line of words is wide.
        page = tokens > LINE
        size = (0.6 + 0.18 * COLUMNS, 0.4 + 0.18 * math.ceil(tokens / COLUMNS)) if page else (1.6 + 0.15 * tokens, 2.2)
        shown, columns = min(heads, max(1, int(TALLEST / (len(layers) * size[1])))), 1
    rows = len(layers) * shown // columns
    figure = Figure(figsize=(max(columns * size[0], 7), rows * size[1] + 1), layout="constrained")
    fewer = [f"{shown} of {heads} heads; the others are in inspect.json"] if shown < heads else []
    figure.suptitle("\n".join([title, *legend(layers), *fewer]), fontsize=9, parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).reshape(len(layers), shown)
    for row, one in zip(panels, layers):
        for head, axes in enumerate(row):
            if head >= len(one.attention["received"]):
                axes.axis("off")
                continue
            axes.set_title(f"{short(one.name)}, {one.mixer}, head {head}", fontsize=8)
            received = np.array(one.attention["received"][head])
            names = example.names(one.attention["sequence"], len(received))
            if grids:
                on_image(axes, example.picture, received, chosen_of(one, head))
            elif page:
                on_page(axes, names, received, chosen_of(one, head))
            else:
                on_line(axes, names, one, head)
    return png(figure)


def legend(layers: Sequence[Layer]) -> Iterator[str]:
    """What the marks are, in words."""
    kinds = {name: [group for heads in one.attention["chosen"].get(name, []) for group in heads]
             for one in layers for name in one.attention["chosen"]}  # fmt: skip
    symbols = {"o": "circles", "s": "squares", "D": "diamonds"}
    for name, groups in kinds.items():
        if any(len(group) == 1 for group in groups):
            yield f"{symbols[MARKS.get(name, OTHER)]}: tokens chosen from {name}"
        if any(len(group) > 1 for group in groups):
            yield f"lines: borders of the parts of {name} whose means are landmarks"


def chosen_of(one: Layer, head: int) -> dict[str, list[list[int]]]:
    return {name: heads[head] for name, heads in one.attention["chosen"].items() if head < len(heads)}


def side_of(tokens: int) -> int | None:
    """The side of the square image that so many tokens are, with or without a class token in front; None: none."""
    sides = [math.isqrt(count) for count in (tokens, tokens - 1) if math.isqrt(count) ** 2 == count]
    return sides[0] if sides else None


def on_image(axes: Axes, picture: np.ndarray, received: np.ndarray, chosen: dict[str, list[list[int]]]) -> None:
    """What is read over the image that the tokens are, but for a class token in front."""
    side = side_of(len(received))
    front = len(received) - side**2
    within = {"extent": (-0.5, side - 0.5, side - 0.5, -0.5), "interpolation": "nearest"}
    axes.imshow(picture, cmap="gray", **within)
    axes.imshow(received[front:].reshape(side, side), cmap="viridis", alpha=0.6, **within)
    for name, groups in chosen.items():
        moved = [[place - front for place in group if place >= front] for group in groups]
        mark(axes, name, moved, side, min(4000 / side**2, 80), "white")
        borders(axes, moved, side, side, "white")
    if front and any(0 in group for groups in chosen.values() for group in groups):
        axes.set_xlabel("class token: chosen", fontsize=7)
    axes.set(xticks=[], yticks=[])


def on_page(axes: Axes, names: Sequence[str], received: np.ndarray, chosen: dict[str, list[list[int]]]) -> None:
    """What is read behind the words of a text, in lines."""
    lines = math.ceil(len(names) / COLUMNS)
    page = np.full(lines * COLUMNS, np.nan)
    page[: len(names)] = scaled(received)
    axes.imshow(page.reshape(lines, COLUMNS), aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for name in dict.fromkeys(names):
        places = np.flatnonzero(np.array(names) == name)
        write(axes, plain(name), places % COLUMNS, places // COLUMNS, np.where(page[places] > 0.6, "black", "white"))
    for name, groups in chosen.items():
        mark(axes, name, groups, COLUMNS, 90, "white")
        borders(axes, groups, COLUMNS, lines, "white", across=False)
    axes.set_yticks(range(lines), [str(line * COLUMNS) for line in range(lines)], fontsize=5)
    axes.set_xticks([])


def write(axes: Axes, word: str, x: np.ndarray, y: np.ndarray, colours: np.ndarray) -> None:
    """Writes a word in several places, as one path: `Axes.text` takes a millisecond for each."""
    if not word.strip():
        return
    path = TextPath((0, 0), word.replace("$", r"\$"), size=5)
    box = path.get_extents()
    path = path.transformed(Affine2D().translate(-(box.x0 + box.x1) / 2, -1.8))
    places = {"offsets": np.stack([x, y], 1), "offset_transform": axes.transData}
    made = PathCollection([path], **places, facecolors=list(colours), linewidths=0, label=word)
    made.set_transform(Affine2D().scale(1 / 72) + axes.figure.dpi_scale_trans)
    axes.add_collection(made)


def on_line(axes: Axes, names: Sequence[str], one: Layer, head: int) -> None:
    """What is read above the words, by all queries and by a few, and below it what is chosen."""
    strips = {"all": np.array(one.attention["received"][head])}
    for place, rows in zip(one.attention["queries"], one.attention["rows"]):
        strips[f"query {place}: {plain(names[place])}"] = np.array(rows[head])
    chosen = chosen_of(one, head)
    blank = np.full((len(chosen), len(names)), np.nan)
    page = np.concatenate([np.stack([scaled(strip) for strip in strips.values()]), blank])
    axes.imshow(page, aspect="auto", cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    for number, (name, groups) in enumerate(chosen.items()):
        line = len(strips) + number
        mark(axes, name, groups, len(names), 12, "black", line)
        borders(axes, groups, len(names), 1, "black", line, across=False)
    told = [*strips, *(f"chosen of {name}" for name in chosen)]
    axes.set_yticks(range(len(page)), told, fontsize=7, parse_math=False)
    turned = 90 if max(map(len, names), default=0) > 2 else 0
    axes.set_xticks(range(len(names)), list(map(plain, names)), rotation=turned, fontsize=6, parse_math=False)
    axes.tick_params(axis="x", length=1)


def scaled(values: np.ndarray) -> np.ndarray:
    """Over the largest size; what is below zero is dark as zero is."""
    return values / max(np.abs(values).max(initial=0), 1e-30)


def plain(name: str) -> str:
    """A word in characters that every font has."""
    return name if name.isascii() else ascii(name)[1:-1]


def mark(
    axes: Axes, name: str, groups: Sequence[Sequence[int]], columns: int, size: float, colour: str, line: int = 0
) -> None:
    """A mark on each token that is a landmark or key itself; `line` is the first one of the page."""
    places = np.array([group[0] for group in groups if len(group) == 1], int)
    look = {"facecolors": "none", "edgecolors": colour, "linewidths": 0.8, "path_effects": outlined(colour)}
    axes.scatter(places % columns, line + places // columns, s=size, marker=MARKS.get(name, OTHER), **look,
                 label=f"chosen of {name}")  # fmt: skip


def borders(
    axes: Axes, groups: Sequence[Sequence[int]], columns: int, lines: int, colour: str, line: int = 0,
    across: bool = True,
) -> None:  # fmt: skip
    """Lines where tokens of different means meet, and around them; `across`: also between one line and the next."""
    if all(len(group) == 1 for group in groups):
        return
    numbers = np.full(columns * lines, -1)
    for number, group in enumerate(groups):
        numbers[group] = number
    numbers = np.pad(numbers.reshape(lines, columns), 1, constant_values=-1)
    look = {"colors": colour, "linewidths": 0.8, "path_effects": outlined(colour)}
    y, x = np.nonzero(numbers[1:-1, :-1] != numbers[1:-1, 1:])
    reach = 0.5 if across else 0.4
    axes.vlines(x - 0.5, line + y - reach, line + y + reach, **look)
    if across:
        y, x = np.nonzero(numbers[:-1, 1:-1] != numbers[1:, 1:-1])
        axes.hlines(line + y - 0.5, x - reach, x + reach, **look)


def outlined(colour: str) -> list[patheffects.AbstractPathEffect]:
    """White lines have dark edges, to be seen on bright cells."""
    return [patheffects.withStroke(linewidth=2, foreground="black")] if colour == "white" else []
