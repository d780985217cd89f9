"""Pathfinder and Path-X: are the two marked points ends of one dashed contour, or do they lie on two?

Linsley et al. 2018 (arXiv:1805.08315); as sequences of pixels in Long Range Arena, Tay et al. 2020 (arXiv:2011.04006),
where Pathfinder has 32 x 32 pixels and Path-X 128 x 128. `drawing` makes the images, or `files` reads the arena's;
`python -m lra.pathfinder --preview=FILE.png` shows some.
"""

import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from efficient_tx.checks import at_least
from efficient_tx.task import Task, data_directory
from lra import parallel, store
from lra.pathfinder import drawing, files

KIND = "tokens"

_FIRST = {"test": 0, "val": 2**30, "train": 2**31}  # where the splits begin in a seed's stream: they never overlap
_GENERATOR = "v3"  # part of the stored data's name: increase it with any change of the drawing
_PIXELS_PER_PART = 2**26  # a part is made in memory, then stored at once; a killed run loses one part
_PIXELS_PER_CHUNK = 2**18  # drawn by a process in one call
_BASELINES = "v1"  # part of the stored baselines' name: increase it with any change of their computation
_FITTED = 20000  # training images that the baseline is fitted on


def sizes(*, resolution: int = 32, contour_length: int = 14, legacy_mask: bool = False, **_) -> dict[str, int]:
    """The sizes that a model needs to know of the task, from the options of `get_task` alone."""
    for name, value, known in (
        ("resolution", resolution, drawing.LOOKS),
        ("contour_length", contour_length, drawing.CONTOUR_LENGTHS),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value}: the arena has {', '.join(map(str, known))}")
    return {"num_classes": 2, "vocab_size": 256, "max_len": resolution**2, "own_masks": legacy_mask}


def split_by(source: str, split: str) -> tuple[str, ...]:
    """Options that may move a training example into `split`; an evaluation must not do that."""
    del split
    return () if source == "generated" else ("seed",)


def get_task(
    *,
    data_dir: str | None = None,
    source: str = "generated",
    train_size: int = 160000,
    val_size: int = 20000,
    test_size: int = 20000,
    resolution: int = 32,
    contour_length: int = 14,
    seed: int = 0,
    legacy_mask: bool = False,
) -> Task:
    """The Pathfinder task: grey values 0 to 255, row by row, labelled 1 if both markers are on one contour.

    Image i of a split is a function of (seed, split, i): it does not depend on the sizes and is in no other split.

    Args:
      data_dir: folder of generated and decoded images, default $EFFICIENT_TX_DATA or ~/.cache/efficient_tx.
      source: "generated", or the path of an `lra_release` directory, see `files.read`.
      train_size, val_size, test_size: number of images. Files are split 80 / 10 / 10 % in an order drawn from `seed`;
        the first ones of each split are taken, or as many as there are; `Task.source` says how many.
      resolution: 32, 64, 128 (Path-X) or 256 pixels a side.
      contour_length: dashes of each of the two contours: 6, 9 or 14 (the arena's task).
      seed: of the generator; for files, of the split.
      legacy_mask: mask black pixels like padding, as the code of the arena and of the Skyformer paper does; the other
        pixels keep their positions.

    Raises:
      ValueError: a setting is out of range, a file is damaged, or there are too few.
      FileNotFoundError: `source` is not a directory, or files in it are missing.
      ModuleNotFoundError: numba is not installed, and the images have to be generated.
      OSError: generated data cannot be stored.
    """
    known = sizes(resolution=resolution, contour_length=contour_length, legacy_mask=legacy_mask)
    counts = {"train": train_size, "val": val_size, "test": test_size}
    at_least(1, train_size=train_size, val_size=val_size, test_size=test_size)
    at_least(0, seed=seed)
    directory = data_directory(data_dir) / "pathfinder"
    if source == "generated":
        folder = directory / f"{resolution}px_length{contour_length}_seed{seed}_{_GENERATOR}"
        settings = {"resolution": resolution, "contour_length": contour_length, "seed": seed}
        splits = [(_generated(folder, split, count, settings), np.arange(count)) for split, count in counts.items()]
        described = f"generated, seed {seed}"
    else:
        folder, parts = files.read(source, directory, resolution, contour_length)
        drawn = files.split(sum(len(part["labels"]) for part in parts), seed)
        splits = [(parts, items[:count]) for items, count in zip(drawn, counts.values(), strict=True)]
        taken = "/".join(str(len(items)) for _, items in splits)
        described = f"{folder}, {taken} images, split with seed {seed}"
    train, validation, test = (Images(parts, items, legacy_mask) for parts, items in splits)
    name = {32: "pathfinder", 128: "path-x"}.get(resolution, f"pathfinder-{resolution}")
    name += "" if contour_length == 14 else f"-length-{contour_length}"
    # The arena's files may lack one image.
    if any(len(items) < count - 1 for (_, items), count in zip(splits, counts.values())):
        name += f"-{pathlib.Path(source).resolve().name}"
    return Task(
        train,
        validation,
        test,
        kind=KIND,
        **known,
        name=name + "-legacy-mask" * legacy_mask,
        source=described,
        baselines=_baselines(train, test, directory),
    )


def state(
    data_dir: str | None = None,
    source: str = "generated",
    resolution: int = 32,
    contour_length: int = 14,
    **_: Any,
) -> tuple[bool, str]:
    """Whether the data are there or can be generated, and where, or what is missing. Nothing is read."""
    if source == "generated":
        numba = importlib.util.find_spec("numba") is not None
        where = f"generated on first use, {data_directory(data_dir) / 'pathfinder'}"
        return numba, where if numba else "numba, which generates the images: pip install numba"
    try:
        return True, str(files.find(source, resolution, contour_length))
    except FileNotFoundError as error:
        return False, str(error)


class Images:
    """Flat images with labels, a random-access source. Item i is a view without a copy.

    Attributes:
      parts: {"pixels": uint8 `[n, size * size]`, "labels": uint8 `[n]`}, with the same n except for the last.
      items: int64 `[images]`, the positions of this split's images in all parts together.
      legacy_mask: whether examples have a mask that is False at black pixels.
    """

    def __init__(self, parts: Sequence[dict[str, np.ndarray]], items: np.ndarray, legacy_mask: bool = False):
        self.parts, self.items, self.legacy_mask = parts, items, legacy_mask

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"inputs": uint8 `[size * size]`, "label": int}, "mask" if legacy. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        part, row = divmod(int(self.items[index]), len(self.parts[0]["labels"]))
        pixels, labels = self.parts[part]["pixels"], self.parts[part]["labels"]
        example = {"inputs": pixels[row], "label": int(labels[row])}
        return example | {"mask": pixels[row] > 0} if self.legacy_mask else example

    def arrays(self, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Pixels `[n, size * size]` and labels `[n]` of the first `count` images, copied."""
        parts, rows = np.divmod(self.items[:count], len(self.parts[0]["labels"]))
        pixels = np.empty((len(rows), self.parts[0]["pixels"].shape[1]), np.uint8)
        labels = np.empty(len(rows), np.uint8)
        for part in np.unique(parts):
            mine = parts == part
            pixels[mine] = self.parts[part]["pixels"][rows[mine]]
            labels[mine] = self.parts[part]["labels"][rows[mine]]
        return pixels, labels


def _generated(folder: pathlib.Path, split: str, total: int, settings: dict[str, int]) -> list[dict]:
    """The first `total` images of a split, in parts. Parts that are not stored yet are drawn."""
    resolution = settings["resolution"]
    size, chunk = (pixels // resolution**2 for pixels in (_PIXELS_PER_PART, _PIXELS_PER_CHUNK))
    parts = []
    for first in range(0, total, size):
        count = min(size, total - first)
        drawn = settings | {"first": _FIRST[split] + first, "count": chunk}
        title = f"Pathfinder {resolution} x {resolution}, {split} images {first} to {first + count} of {total}"
        make = functools.partial(parallel.collect, "lra.pathfinder.drawing:draw_many", drawn, count, title)
        parts.append(store.stored(folder / f"{split}-{first}-{first + count}", make, files.form(count, resolution)))
    return parts


def brightness(pixels: np.ndarray) -> np.ndarray:
    """Features `[n, 15]` without contours: mean, standard deviation, share of black, quadrant means, histogram.

    Args:
      pixels: uint8 `[n, size * size]`.
    """
    side = int(pixels.shape[1] ** 0.5)
    features = []
    for block in np.array_split(pixels, max(1, pixels.size // 2**24)):  # bounds the memory of the float copies
        values = block.astype(np.float32)
        quadrants = values.reshape(len(block), 2, side // 2, 2, side // 2).mean((2, 4)).reshape(len(block), 4)
        rows = np.arange(len(block))[:, None]
        histogram = np.bincount((rows * 8 + (block >> 5)).ravel(), minlength=8 * len(block)).reshape(-1, 8)
        features.append(
            np.column_stack(
                [values.mean(1), values.std(1), (block == 0).mean(1), quadrants, histogram / block.shape[1]]
            )
        )
    return np.concatenate(features)


def fit_logistic(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Weights `[n + 1]`, the intercept last, of a ridge-regularised logistic regression, by Newton's method."""
    x = np.column_stack([features, np.ones(len(features))])
    weights = np.zeros(x.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + np.eye(len(weights))
        weights -= np.linalg.solve(hessian, x.T @ (p - labels) + weights)
    return weights


def _baselines(train: Images, test: Images, directory: pathlib.Path) -> dict[str, float]:
    """Test accuracy of the best constant answer and of a logistic regression on brightness, fitted on train.

    Stored under a digest of the images.
    """
    pixels, labels = train.arrays(_FITTED)
    test_pixels, test_labels = test.arrays()
    digest = hashlib.blake2b(digest_size=16)
    for array in (pixels, labels, test_pixels, test_labels):
        digest.update(array)

    def compute() -> dict[str, np.ndarray]:
        features = brightness(pixels)
        centre, scale = features.mean(0), features.std(0) + 1e-6
        weights = fit_logistic((features - centre) / scale, labels)
        answers = ((brightness(test_pixels) - centre) / scale) @ weights[:-1] + weights[-1] > 0
        return {
            "constant": np.mean(test_labels == (labels.mean() > 0.5)),
            "brightness": np.mean(test_labels == answers),
        }

    place = directory / f"baselines-{digest.hexdigest()}-{_BASELINES}"
    stored = store.stored(place, compute, store.Form(constant=store.ACCURACY, brightness=store.ACCURACY))
    return {name: float(accuracy) for name, accuracy in stored.items()}
