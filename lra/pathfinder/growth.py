"""Compiled random walks of Pathfinder's contours; `drawing` makes the tables that they read. Needs numba.

Occupancy is uint8, 255 = taken. A dash is (y, x, state): its start and a row of the tables, which fixes its direction.
States 0 to 359 are first dashes, drawn forwards from their tail at a whole degree. The others are later dashes, drawn
backwards from their head, with one state for each displacement of a head from its pivot.
"""

from typing import NamedTuple

import numba
import numpy as np

_ANGLES = 360  # of first dashes
_TRIES = 3  # for one dash
_CONTOUR_TRIES = 5  # for one distractor
_CLASH = 459  # 1.8 x 255: two masks that add up to this overlap
_FREE = 76  # 0.3 x 255: largest occupancy under a first dash
_LEAST_FREE = 0.01  # share of free pixels below which no distractor is added
_DEAD_END = 1e-4  # total weight of the candidates below which a contour ends


class Tables(NamedTuple):
    """Arrays that depend on the look of the dashes only; offsets and displacements are (y, x).

    Places are whole pixels. A place plus a fractional displacement is rounded up after the sum, as published. So the
    last bit of a sine matters near the upper and left borders, where the sum does not absorb it.

    Attributes:
      lines, masks: uint8 `[states, window, window]`, a dash and the room that it takes, around its start.
      steps: float64 `[states, 2]`, from a dash's pivot to the next one.
      offsets: int64 `[candidates, 2]`, displacements of heads from the pivot; candidate c has state 360 + c.
      weights: float64 `[states, candidates]`, how well a candidate continues a dash.
      heads, pivots: float64 `[360, 2]`, from the tail of a first dash to its head, and from there to its pivot.
      shapes: int64 `[360, most, 2]`, the pixels that a first dash takes, relative to its tail.
      counts: int64 `[360]`, the number of pixels in `shapes`; 0 if no tail counts as free.
      disc: int64 `[pixels, 2]`, the pixels within the margin.
    """

    lines: np.ndarray
    masks: np.ndarray
    steps: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray
    heads: np.ndarray
    pivots: np.ndarray
    shapes: np.ndarray
    counts: np.ndarray
    disc: np.ndarray


@numba.njit(cache=True)
def _below(rng, n):
    return int(rng.random() * n)


@numba.njit(cache=True)
def _inside(y, x, size):
    return 0 <= y < size and 0 <= x < size


@numba.njit(cache=True)
def _moved(y, x, displacement):
    return int(np.ceil(y + displacement[0])), int(np.ceil(x + displacement[1]))


@numba.njit(cache=True)
def _clashes(occupied, stamp, y, x):
    size, half = occupied.shape[0], stamp.shape[0] // 2
    for i in range(max(0, y - half), min(size, y + half + 1)):
        for j in range(max(0, x - half), min(size, x + half + 1)):
            taken, wanted = np.int64(occupied[i, j]), np.int64(stamp[i - y + half, j - x + half])
            if taken + wanted >= _CLASH and taken / 255 + wanted / 255 >= 1.8:  # the sum of two quotients, as published
                return True
    return False


@numba.njit(cache=True)
def _occupy(occupied, stamp, y, x):
    size, half = occupied.shape[0], stamp.shape[0] // 2
    for i in range(max(0, y - half), min(size, y + half + 1)):
        for j in range(max(0, x - half), min(size, x + half + 1)):
            occupied[i, j] = max(occupied[i, j], stamp[i - y + half, j - x + half])


@numba.njit(cache=True)
def _nearby(occupied, offsets, count, y, x):
    """The largest value at (y, x) plus the first `count` offsets."""
    most = 0
    for i in range(count):
        if _inside(y + offsets[i, 0], x + offsets[i, 1], occupied.shape[0]):
            most = max(most, np.int64(occupied[y + offsets[i, 0], x + offsets[i, 1]]))
    return most


@numba.njit(cache=True)
def extend(rng, tables, occupied, pivot, dash, new):
    """Draws the next dash into `new` and moves the pivot to its own; False at a dead end."""
    size, state = occupied.shape[0], dash[2]
    y, x = _moved(pivot[0], pivot[1], tables.steps[state])
    cumulated = np.zeros(len(tables.offsets))
    total = 0.0
    for c in range(len(tables.offsets)):
        weight = tables.weights[state, c]
        head_y, head_x = y + tables.offsets[c, 0], x + tables.offsets[c, 1]
        if weight > 0.0 and _inside(head_y, head_x, size):
            total += weight * (1.0 - _nearby(occupied, tables.disc, len(tables.disc), head_y, head_x) / 255)
        cumulated[c] = total
    if total < _DEAD_END:
        return False
    for _ in range(_TRIES):
        c = np.searchsorted(cumulated, rng.random() * total, side="right")
        head_y, head_x = y + tables.offsets[c, 0], x + tables.offsets[c, 1]
        if not _clashes(occupied, tables.masks[_ANGLES + c], head_y, head_x):
            _occupy(occupied, tables.masks[state], dash[0], dash[1])
            pivot[0], pivot[1] = y, x
            new[0], new[1], new[2] = head_y, head_x, _ANGLES + c
            return True
    return False


@numba.njit(cache=True)
def _begin(tables, size, y, x, angle, pivot, dash):
    """Puts a first dash with its tail at (y, x); False if its head or its pivot is outside the image."""
    head_y, head_x = _moved(y, x, tables.heads[angle])
    pivot[0], pivot[1] = _moved(head_y, head_x, tables.pivots[angle])
    dash[0], dash[1], dash[2] = y, x, angle
    return _inside(head_y, head_x, size) and _inside(pivot[0], pivot[1], size)


@numba.njit(cache=True)
def _seed_pair(rng, tables, size, seed_distance, pivots, pair):
    """The two first dashes: the first near the centre, the tail of the second at the seed distance from its tail."""
    for trial in range(_TRIES):
        angle = _below(rng, _ANGLES)
        if tables.counts[angle] == 0:
            return False
        shape = tables.shapes[angle, : tables.counts[angle]]
        # Free tails are a rectangle: all of the dash must be in the central square.
        low_y, high_y = 2 * seed_distance - shape[:, 0].min(), size - 2 * seed_distance - shape[:, 0].max()
        low_x, high_x = 2 * seed_distance - shape[:, 1].min(), size - 2 * seed_distance - shape[:, 1].max()
        if low_y >= high_y or low_x >= high_x:
            return False
        y, x = low_y + _below(rng, high_y - low_y), low_x + _below(rng, high_x - low_x)
        if _begin(tables, size, y, x, angle, pivots[0], pair[0, 0]):
            break
        if trial == _TRIES - 1:
            return False
    for _ in range(_TRIES):
        angle = _below(rng, _ANGLES)
        around = _below(rng, 360) * np.pi / 180
        y2, x2 = np.rint(y + seed_distance * np.sin(around)), np.rint(x + seed_distance * np.cos(around))
        if _begin(tables, size, int(y2), int(x2), angle, pivots[1], pair[1, 0]):
            return True
    return False


@numba.njit(cache=True)
def draw_pair(rng, tables, occupied, padding, seed_distance, pair):
    """The two long contours, drawn in turns into `pair` `[2, dashes, 3]`; returns the number of attempts.

    `occupied` then holds the border and all dashes except the last one of the first contour.
    """
    size, dashes = occupied.shape[0], pair.shape[1]
    pivots = np.zeros((2, 2), np.int64)
    attempts = 0
    while True:
        attempts += 1
        if not _seed_pair(rng, tables, size, seed_distance, pivots, pair):
            continue
        occupied[:] = 255
        occupied[padding : size - padding, padding : size - padding] = 0
        complete = True
        for i in range(1, dashes):
            for contour in range(2):
                if complete:
                    complete = extend(rng, tables, occupied, pivots[contour], pair[contour, i - 1], pair[contour, i])
        if complete:
            _occupy(occupied, tables.masks[pair[1, -1, 2]], pair[1, -1, 0], pair[1, -1, 1])
            return attempts


@numba.njit(cache=True)
def free_tails(tables, occupied, angle, tails):
    """Writes into `tails` the pixels y * size + x where a first dash fits; returns their number."""
    if tables.counts[angle] == 0:
        return 0
    size = occupied.shape[0]
    lined = occupied.copy()
    lined[0], lined[-1], lined[:, 0], lined[:, -1] = 255, 255, 255, 255
    found = 0
    for y in range(size):
        for x in range(size):
            free = True
            for i in range(tables.counts[angle]):
                to_y, to_x = y + tables.shapes[angle, i, 0], x + tables.shapes[angle, i, 1]
                if _inside(to_y, to_x, size) and lined[to_y, to_x] > _FREE:
                    free = False
                    break
            if free:
                tails[found] = y * size + x
                found += 1
    return found


@numba.njit(cache=True)
def _draw_distractor(rng, tables, occupied, tails, pivot, contour):
    size = occupied.shape[0]
    seeded = False
    for _ in range(_TRIES):
        if not seeded:
            angle = _below(rng, _ANGLES)
            if np.sum(occupied <= _FREE) < _LEAST_FREE * size * size:
                return False
            found = free_tails(tables, occupied, angle, tails)
            if found == 0:
                return False
            tail = tails[_below(rng, found)]
            seeded = _begin(tables, size, tail // size, tail % size, angle, pivot, contour[0])
    if not seeded:
        return False
    for i in range(1, len(contour)):
        if not extend(rng, tables, occupied, pivot, contour[i - 1], contour[i]):
            return False
    y, x, state = contour[-1]
    _occupy(occupied, tables.masks[state], y, x)
    return True


@numba.njit(cache=True)
def draw_distractors(rng, tables, occupied, contours):
    """Draws short contours into `contours` `[most, dashes, 3]` where there is room; returns their number."""
    tails = np.empty(occupied.size, np.int64)
    pivot = np.zeros(2, np.int64)
    drawn = 0
    for _ in range(len(contours)):
        for _ in range(_CONTOUR_TRIES):
            before = occupied.copy()
            if _draw_distractor(rng, tables, occupied, tails, pivot, contours[drawn]):
                drawn += 1
                break
            occupied[:] = before
    return drawn


@numba.njit(cache=True)
def paint(image, tables, contours, contrast):
    """Draws the dashes of `contours` `[contours, dashes, 3]` into a float64 image; a pixel keeps the larger value."""
    size, half = image.shape[0], tables.lines.shape[1] // 2
    for contour in contours:
        for dash in contour:
            y, x, line = dash[0], dash[1], tables.lines[dash[2]]
            for i in range(max(0, y - half), min(size, y + half + 1)):
                for j in range(max(0, x - half), min(size, x + half + 1)):
                    image[i, j] = max(image[i, j], line[i - y + half, j - x + half] / 255 * contrast)
