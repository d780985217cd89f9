"""Pathfinder from the files of Long Range Arena: PNG images beside plain-text metadata."""

import functools
import hashlib
import pathlib
import sys

import numpy as np

from efficient_tx.files import visible
from lra import parallel, release, store

LEVELS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}
_PIXELS_PER_PART = 2**28
_FILES_PER_CHUNK = 256
_FEWEST = 10  # images; validation and test then have one each
_LAYOUT = "pathfinder{0}/{1}/imgs/<batch>/sample_<i>.png and pathfinder{0}/{1}/metadata/<batch>.npy (lines of text)"
_KNOWN_EMPTY = ("pathfinder32", "curv_baseline", "imgs/0/sample_172.png")  # in the arena's archive


def read(
    source: str, directory: pathlib.Path, resolution: int, contour_length: int
) -> tuple[pathlib.Path, list[dict[str, np.ndarray]]]:
    """The images of one level, sorted by file name. They are decoded once and then kept under `directory`.

    Args:
      source: folder of an unpacked `lra_release`. The archive holds a directory of this name inside itself, and
        pathfinder128 in both; the inner one is taken, as in other codes.
      directory: folder of the decoded images. Their name there depends on the level's place and metadata.
      resolution: 32, 64, 128 or 256.
      contour_length: a key of LEVELS.

    Returns:
      The level's directory, and parts {"pixels": uint8 `[n, resolution^2]`, "labels": uint8 `[n]`}.

    Raises:
      FileNotFoundError: files are missing; the message says which, and where they were searched.
      ValueError: an image or a line of metadata is damaged, or there are fewer than 10 images.
    """
    level = find(source, resolution, contour_length)
    labels, digest = _labels(level)
    skipped = [name for name in labels if (level.parent.name, level.name, name) == _KNOWN_EMPTY]
    for name in skipped:
        if (level / name).is_file() and (level / name).stat().st_size == 0:
            print(f"{level / name} is empty, as in the arena's archive: left out", file=sys.stderr)
            del labels[name]
    names = sorted(labels)
    if len(names) < _FEWEST:
        raise ValueError(f"{level} has {len(names)} images: fewer than {_FEWEST} cannot be split")
    size = _PIXELS_PER_PART // resolution**2
    parts = []
    for first in range(0, len(names), size):
        mine = names[first : first + size]
        settings = {"level": str(level), "labels": {name: labels[name] for name in mine}, "resolution": resolution}
        title = f"Pathfinder, files {first} to {first + len(mine)} of {len(names)}"
        make = functools.partial(parallel.collect, "lra.pathfinder.files:decode", settings, len(mine), title)
        folder = directory / f"{resolution}px_length{contour_length}_files_{digest}" / f"{first}-{first + len(mine)}"
        parts.append(store.stored(folder, make, form(len(mine), resolution)))
    return level, parts


def form(count: int, resolution: int) -> store.Form:
    """What a part of `count` images is: "pixels" and "labels"."""
    return store.Form(
        pixels=store.Array("uint8", (count, resolution**2), 0, 255), labels=store.Array("uint8", (count,), 0, 1)
    )


def split(count: int, seed: int) -> list[np.ndarray]:
    """Positions of the training, validation and test images: 80 / 10 / 10 %, in an order drawn from `seed`."""
    order = np.argsort(np.random.default_rng([seed, count]).random(count), kind="stable")
    return np.split(order, [count - 2 * (count // 10), count - count // 10])


def find(source: str, resolution: int, contour_length: int) -> pathlib.Path:
    """The directory of a level in an unpacked `lra_release`. Raises FileNotFoundError."""
    level = LEVELS[contour_length]
    layout = _LAYOUT.format(resolution, level)
    return release.find(
        source,
        [f"{folder}pathfinder{resolution}/{level}" for folder in ("lra_release/lra_release/", "lra_release/", "")],
        lambda place: (place / "metadata").is_dir(),
        holds=layout,
        missing=f"the images of lra_release.gz, {layout}, are",
    )


def _labels(level: pathlib.Path) -> tuple[dict[str, int], str]:
    """File name, relative to the level's directory -> label, of all metadata files; and a digest of place and lines."""
    labels = {}
    # The lines also describe how each image was drawn, so they differ for other images with the same names.
    digest = hashlib.blake2b(str(level.resolve()).encode(), digest_size=8)
    for path in visible(level / "metadata", "*.npy"):
        content = path.read_bytes()
        digest.update(content)
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            fields = line.split()
            if len(fields) < 4 or fields[3] not in ("0", "1"):
                raise ValueError(
                    f"{path}, line {number}: expected text as 'imgs/0 sample_0.png 0 1 ...', the fourth field the label"
                )
            name, label = f"{fields[0]}/{fields[1]}", int(fields[3])
            if labels.setdefault(name, label) != label:
                raise ValueError(f"{path}, line {number}: {name} has the label {label}, and another one before")
    if not labels:
        raise FileNotFoundError(f"{level / 'metadata'}: no line of metadata in any .npy file there")
    return labels, digest.hexdigest()


def decode(index: int, *, level: str, labels: dict[str, int], resolution: int) -> dict[str, np.ndarray] | str:
    """Chunk `index` of the named images: `pixels` uint8 `[n, resolution^2]` and `labels`, or an error message."""
    from PIL import Image

    names = list(labels)[index * _FILES_PER_CHUNK : (index + 1) * _FILES_PER_CHUNK]
    pixels = np.empty((len(names), resolution**2), np.uint8)
    for row, name in zip(pixels, names, strict=True):
        path = pathlib.Path(level, name)
        try:
            with Image.open(path) as image:
                values = np.asarray(image.convert("L"))
        except FileNotFoundError:
            return f"{path}: no such file, though the metadata beside it name it"
        except Exception as error:  # a damaged PNG raises almost any error
            return f"{path}: no readable PNG image ({error}); unpack lra_release.gz again"
        if values.shape != (resolution, resolution):
            return f"{path}: {values.shape[1]} x {values.shape[0]} pixels, expected {resolution} x {resolution}"
        row[:] = values.ravel()
    return {"pixels": pixels, "labels": np.array([labels[name] for name in names], np.uint8)}
