"""Pathfinder's images: two long dashed contours, short distractors, and a marker at two ends of the long contours.

The algorithm is that of Linsley et al. 2018 (arXiv:1805.08315) and Kim et al. 2020 (arXiv:1906.01558), as published in
drewlinsley/pathfinder ab9c130. The parameters for each size are those of Long Range Arena (Tay et al. 2020,
arXiv:2011.04006, data/pathfinder.py). Dashes are drawn with Pillow, once for each direction; the walks are compiled.
"""

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from lra.pathfinder.growth import Tables

ANGLES = 360  # of first dashes, whole degrees from -180
CONTOUR_LENGTHS = (6, 9, 14)  # dashes; 14 is Long Range Arena's
_FINE = 2  # dashes and markers are drawn at this many times the resolution and then sampled down


class Look(NamedTuple):
    """The parameters of one image size, lengths in pixels.

    Attributes:
      padding: border that stays free of long contours.
      length, thickness: of a dash.
      margins: free space around dashes; one of them is drawn for each image.
      marker: radius of the markers.
      seed_distance: between the tails of the two long contours.
      continuity: how strongly a contour prefers to go straight on.
      distractor_dashes: largest number of dashes of all distractors together.
      target, distractor: brightness of long and short contours; markers have 1.
    """

    padding: int
    length: int
    thickness: float
    margins: tuple[int, ...]
    marker: float
    seed_distance: int
    continuity: float
    distractor_dashes: int
    target: float
    distractor: float


LOOKS = {
    32: Look(1, 2, 0.5, (1,), 1.5, 7, 1.0, 20, 1.5, 2.0),
    64: Look(1, 5, 1.0, (1,), 2.5, 12, 1.8, 22, 0.8, 0.8),
    128: Look(1, 5, 1.5, (2, 3), 3.0, 20, 1.8, 35, 0.9, 0.9),
    256: Look(22, 5, 2.0, (3,), 5.0, 27, 1.8, 30, 1.0, 1.0),
}


class Drawing(NamedTuple):
    """One image and its geometry.

    Attributes:
      pixels: uint8 `[size, size]`, the brightest 255.
      label: 1 if the markers are at the two ends of one contour, 0 if they are on two.
      contours: int64 `[2, dashes, 3]`, the dashes (y, x, state) of the long contours, see lra.pathfinder.growth.
      distractors: int64 `[n, dashes, 3]`, those of the short contours.
      markers: int64 `[2, 2]`, (y, x) of the two markers, at a tail and at a head.
      margin: free space around dashes.
      attempts: pairs of long contours that were begun, including the complete one.
    """

    pixels: np.ndarray
    label: int
    contours: np.ndarray
    distractors: np.ndarray
    markers: np.ndarray
    margin: int
    attempts: int


def draw(index: int, *, resolution: int, contour_length: int, seed: int) -> Drawing:
    """Image `index` of the seed's stream, the same in any process. Sizes are in LOOKS and CONTOUR_LENGTHS.

    Raises:
      ModuleNotFoundError: numba is not installed.
    """
    growth = _growth()
    look = LOOKS[resolution]
    rng = np.random.default_rng([seed, index])  # only `random` is drawn: NumPy keeps its stream over versions
    label = int(2 * rng.random())
    margin = look.margins[int(len(look.margins) * rng.random())]
    tables = make_tables(look.length, look.thickness, margin, look.continuity)
    occupied = np.empty((resolution, resolution), np.uint8)
    contours = np.empty((2, contour_length, 3), np.int64)
    attempts = growth.draw_pair(rng, tables, occupied, look.padding, look.seed_distance, contours)
    dashes = contour_length // 3
    distractors = np.empty((look.distractor_dashes // dashes, dashes, 3), np.int64)
    distractors = distractors[: growth.draw_distractors(rng, tables, occupied, distractors)]
    origin = int(2 * rng.random())
    terminal = origin if label else 1 - origin
    markers = np.stack([contours[origin, 0, :2], contours[terminal, -1, :2]])
    image = np.max([draw_marker(resolution, y, x, look.marker) for y, x in markers], axis=0) / 255
    growth.paint(image, tables, contours, look.target)
    growth.paint(image, tables, distractors, look.distractor)
    pixels = (image * (255 / image.max()) + 0.5).astype(np.uint8)
    return Drawing(pixels, label, contours, distractors, markers, margin, attempts)


def ends(contour: np.ndarray, resolution: int, margin: int) -> np.ndarray:
    """The tails and heads of a contour's dashes `[dashes, 3]`: (y, x) `[dashes, 2, 2]`, tail first."""
    look = LOOKS[resolution]
    result = []
    for y, x, state in contour.tolist():
        angle = angles(look.length + margin)[state]
        tail_first = state < ANGLES
        other = np.array([y, x]) + look.length * (1 if tail_first else -1) * np.array([np.sin(angle), np.cos(angle)])
        result.append([(y, x), other] if tail_first else [other, (y, x)])
    return np.array(result)


def draw_many(index: int, *, first: int, count: int, **settings: int) -> dict[str, np.ndarray]:
    """Chunk `index` of `count` images, counted from image `first`: `pixels` `[count, size * size]`, `labels` uint8."""
    drawings = [draw(first + index * count + i, **settings) for i in range(count)]
    return {
        "pixels": np.stack([drawing.pixels.ravel() for drawing in drawings]),
        "labels": np.array([drawing.label for drawing in drawings], np.uint8),
    }


def _growth():
    try:
        from lra.pathfinder import growth
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Pathfinder's images are drawn by compiled code, which needs {error.name}: pip install {error.name}, or "
            "give the files of Long Range Arena as task.source",
            name=error.name,
        ) from None
    return growth


def displacements(distance: float, angles: Sequence[float]) -> np.ndarray:
    """Displacements (y, x) `[angles, 2]` of length `distance` at each angle (radians, from x towards y)."""
    # Not np.sin: its last bit matters and differs between processors.
    return np.array([(distance * math.sin(angle), distance * math.cos(angle)) for angle in angles])


def turned(angle: float) -> float:
    """The opposite direction."""
    return angle + math.pi if angle < 0 else angle - math.pi


def disc(radius: float) -> np.ndarray:
    """Offsets (y, x) `[pixels, 2]` of the pixels within `radius`."""
    reach = int(radius)
    grid = np.stack(np.mgrid[-reach : reach + 1, -reach : reach + 1], axis=-1).reshape(-1, 2)
    return grid[(grid**2).sum(1) <= radius**2]


def candidates(radius: int) -> np.ndarray:
    """Offsets (y, x) `[candidates, 2]` of the pixels on a circle, sampled once per pixel of its arc."""
    angles = np.radians(np.arange(0, 360, 360 / (2 * np.pi * radius)))
    return np.unique(np.floor(radius * np.stack([np.sin(angles), np.cos(angles)], axis=-1)).astype(np.int64), axis=0)


@functools.lru_cache
def angles(radius: int) -> list[float]:
    """The direction of each state of a dash: whole degrees for first dashes, then the heads of the candidates."""
    first = [(degrees - 180) * math.pi / 180 for degrees in range(ANGLES)]
    return first + [math.atan2(y, x) for y, x in candidates(radius).tolist()]


@functools.lru_cache
def make_tables(length: int, thickness: float, margin: int, continuity: float) -> "Tables":
    """The tables of lra.pathfinder.growth for one look of the dashes."""
    every = angles(length + margin)
    first, later = every[:ANGLES], every[ANGLES:]
    turn = np.abs(np.subtract.outer(every, later))
    turn = np.minimum(turn, 2 * np.pi - turn)
    weights = np.where(continuity * turn < np.pi / 2, np.cos(continuity * turn) ** 2, 0.0)
    dashes = [draw_dash(angle, length, thickness, margin) for angle in [*first, *map(turned, later)]]
    lines, masks = (np.stack(arrays) for arrays in zip(*dashes))
    # As published, a first dash is tested one pixel further than it is drawn, in a window of length + margin.
    half, reach = masks.shape[1] // 2, length + margin
    shapes = [np.argwhere(mask == 255) - half + 1 for mask in masks[: len(first)]]
    shapes = [shape[(np.abs(shape) <= reach).all(1)] for shape in shapes]
    counts = np.array([len(shape) if _spans_corners(shape) else 0 for shape in shapes])
    padded = np.zeros((len(first), counts.max(), 2), np.int64)
    for row, shape in zip(padded, shapes, strict=True):
        row[: len(shape)] = shape[: len(row)]
    return _growth().Tables(
        lines=lines,
        masks=masks,
        steps=displacements(length + 2 * margin, every),
        offsets=candidates(length + margin),
        weights=weights,
        heads=displacements(length, first),
        pivots=displacements(length + margin, [turned(angle) for angle in first]),
        shapes=padded,
        counts=counts,
        disc=disc(margin),
    )


def _spans_corners(shape: np.ndarray) -> bool:
    """Whether a first dash has a pixel in the image for every place of its tail, also in each corner.

    If not, the published code's dilation (cv2's) gives -1.8e308, and no tail counts as free. The published data have
    this bug: at 32 pixels most first dashes point up and to the left, and distractors are few.
    """
    return all(((shape * signs) >= 0).all(1).any() for signs in ((1, 1), (1, -1), (-1, 1), (-1, -1)))


def draw_dash(angle: float, length: int, thickness: float, margin: int) -> tuple[np.ndarray, np.ndarray]:
    """A dash from the centre of a window in the direction `angle`, and the room that it takes; uint8 `[side, side]`."""
    from PIL import Image, ImageDraw

    reach = length + int(np.ceil(thickness)) + margin
    centre = reach * _FINE
    end_y, end_x = np.ceil(centre + displacements(length * _FINE, [angle])[0]).tolist()
    fine = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    ImageDraw.Draw(fine).line([(centre, centre), (end_x, end_y)], fill=255, width=round(thickness * _FINE))
    pixels = np.asarray(fine)
    grown = np.zeros_like(pixels)
    for y, x in np.argwhere(pixels):
        near = np.array([y, x]) + disc(margin * _FINE)
        near = near[((near >= 0) & (near <= 2 * centre)).all(1)]
        grown[near[:, 0], near[:, 1]] = 255
    return _sample_down(fine, 2 * reach + 1), _sample_down(Image.fromarray(grown), 2 * reach + 1)


def draw_marker(size: int, y: int, x: int, radius: float) -> np.ndarray:
    """A filled disc, uint8 `[size, size]`."""
    from PIL import Image

    up, across = np.ogrid[-y * _FINE : (size - y) * _FINE, -x * _FINE : (size - x) * _FINE]
    fine = np.where(up**2 + across**2 <= (radius * _FINE) ** 2, np.uint8(255), np.uint8(0))
    return _sample_down(Image.fromarray(fine), size)


def _sample_down(fine, size: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(fine.resize((size, size), Image.Resampling.LANCZOS))
