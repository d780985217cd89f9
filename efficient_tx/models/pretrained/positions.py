"""Positions: fits a table of position embeddings to the grid of patches and the class token of a ViT."""

import math
from collections.abc import Sequence

import numpy as np

from efficient_tx.models.pretrained.tensors import Tensors
from efficient_tx.models.vit import ViT

Grid = tuple[int, int]


def grid_of(length: int, before: Sequence[int], grids: Sequence[Grid | None]) -> Grid:
    """The rows and columns of a table of `length` positions, `before` of which may stand in front of the patches.

    They are the first of `grids` that the table fits, or a square.

    Raises:
      ValueError: the table fits none of them and no square.
    """
    counts = [length - first for first in before if length > first]
    for grid in grids:
        if grid and math.prod(grid) in counts:
            return grid
    for count in counts:
        if (side := math.isqrt(count)) ** 2 == count:
            return side, side
    looked = " or ".join(f"{rows} × {columns}" for rows, columns in dict.fromkeys(filter(None, grids)))
    more = " and one for a class token" if 1 in before else ""
    raise ValueError(f"learned has {length} positions: neither those of {looked} patches nor of a square{more}")


def fit_positions(model: ViT, found: Tensors, *, before: Sequence[int] = (0, 1), said: Grid | None = None) -> list[str]:
    """Fits the position embeddings in `found` to the grid and the class token of `model`; returns lines that report it.

    Some checkpoints also have an embedding for the class token. For others (big_vision since 2022, DeiT III) it is
    zero. A table of another grid is resized bilinearly with the corners kept, as in big_vision.

    Args:
      model: the model for which they are.
      found: the table is in it as "learned", `[positions, features]`, and is replaced.
      before: how many positions may stand in front of those of the patches.
      said: the rows and columns of the file's own grid, if it says them; else the table has those of `model` if it
        fits them, and those of a square if not.

    Raises:
      ValueError: one line: the table fits no grid.
    """
    if "learned" not in found or model.learned is None:
        return []
    height, width, _ = model.image_shape
    new = height // model.patch_size, width // model.patch_size
    table = found["learned"]
    old = grid_of(len(table), before, [said, new])
    first, grid = np.split(table, [len(table) - math.prod(old)])
    lines = []
    if new != old:
        from scipy.ndimage import zoom  # a tenth of the imports of every run, of which few resize anything

        factors = (new[0] / old[0], new[1] / old[1], 1)
        grid = zoom(grid.reshape(*old, -1), factors, order=1).reshape(math.prod(new), -1)
        lines = [f"  position embeddings resized from {old[0]} × {old[1]} to {new[0]} × {new[1]}"]
    if model.cls is None:
        first = first[:0]
    elif not len(first):
        first = np.zeros_like(grid[:1])
    found["learned"] = np.concatenate([first, grid])
    return lines
