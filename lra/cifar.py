"""CIFAR-10's own archives, python or binary, packed or not. Krizhevsky 2009, www.cs.toronto.edu/~kriz/cifar.html."""

import io
import pathlib
import pickle
import tarfile
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from efficient_tx.data.labels import class_labels

SIDE = 32
PLACES = ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_NAMES = [name for names in _BATCHES.values() for name in names]


def find(path: pathlib.Path) -> pathlib.Path | None:
    """The archive or folder of batches at `path` or inside it. Raises ValueError for a folder of only some of them."""
    for place in (path, *(path / name for name in PLACES)):
        if place.is_file():
            return place
        if batches := _files(place):
            _check_whole(place, batches)
            return place
    return None


def read(place: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "test"}: colours uint8 `[n, 1024, 3]`, row by row, and labels uint8 `[n]`, in stored order.

    Raises:
      ValueError: a file is missing or damaged.
    """
    batches = dict(_contents(place))
    _check_whole(place, batches)
    read = {name: _batch(content, f"{place}: {name}") for name, content in batches.items()}
    return {
        split: tuple(np.concatenate([read[name][part] for name in names]) for part in range(2))
        for split, names in _BATCHES.items()
    }


def _check_whole(place: pathlib.Path, batches: Collection[str]) -> None:
    for name in _NAMES:
        if name not in batches:
            raise ValueError(f"{place} is not whole: it has no {name} and no {name}.bin")


def _files(place: pathlib.Path) -> dict[str, pathlib.Path]:
    """The batches in a folder, by name without .bin."""
    paths = [path for name in _NAMES for path in (place / name, place / f"{name}.bin") if path.is_file()]
    return {path.name.removesuffix(".bin"): path for path in paths}


def _contents(place: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """The batches of a folder or an archive, by name."""
    if place.is_dir():
        yield from ((name, path.read_bytes()) for name, path in _files(place).items())
        return
    try:
        with tarfile.open(place, "r:gz") as tar:
            for member in tar:
                name = pathlib.PurePosixPath(member.name).name.removesuffix(".bin")
                if member.isfile() and name in _NAMES:
                    yield name, tar.extractfile(member).read()
    except Exception as error:  # a flipped bit makes the readers of tar and gzip raise almost any error
        raise ValueError(f"{place} is damaged or no archive of CIFAR-10 ({error})") from None


def _batch(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Colours `[n, 1024, 3]` and labels `[n]` of one file. Its rows are all red, all green, then all blue pixels."""
    row = 3 * SIDE * SIDE
    try:
        if content[:1] == b"\x80":  # a pickle; in a binary file this is a label, 0 to 9
            batch = _Plain(io.BytesIO(content), encoding="bytes").load()
            pixels, labels = np.asarray(batch[b"data"]), batch[b"labels"]
        else:
            rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + row)
            pixels, labels = rows[:, 1:], rows[:, 0]
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (row,) or not len(pixels):
            raise ValueError(f"its pixels are {pixels.dtype} {list(pixels.shape)}, not uint8 [images, {row}]")
        labels = class_labels(labels, count=len(pixels), num_classes=10).astype(np.uint8)
        return pixels.reshape(-1, 3, SIDE * SIDE).transpose(0, 2, 1), labels
    except Exception as error:  # a flipped bit makes a pickle raise almost any error
        raise ValueError(f"{where} is damaged ({error})") from None


# All that CIFAR-10's files name, which Python 2 wrote.
_NAMED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _Plain(pickle.Unpickler):
    """Unpickles arrays only: a pickle from elsewhere must not run other code, and imports nothing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _NAMED[module, name]
