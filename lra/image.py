"""Image: which of ten things does a small grey picture show? Its 1,024 pixels are read one by one, row by row.

CIFAR-10 (Krizhevsky 2009), as a task of Long Range Arena, Tay et al. 2020 (arXiv:2011.04006). Without CIFAR-10,
Fashion-MNIST from `python -m efficient_tx.data.fetch fashion_mnist` gives a task of the same form with its own name.
"""

import gzip
import hashlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from efficient_tx.checks import OptionError, at_least
from efficient_tx.data import fetched, prepared
from efficient_tx.data.labels import class_labels
from efficient_tx.files import local_path, visible
from efficient_tx.task import Task, data_directory
from lra import cifar, store

KIND = "tokens"
COUNTS = {"cifar10": (50000, 10000), "fashion_mnist": (60000, 10000)}  # images for training and for testing

_SIDES = {"fashion_mnist": 28}
_READER = "v2"  # part of the stored data's name: increase it with any change of the reader
_RIDGE = 1.0


def sizes(*, source: str = "cifar10", legacy_mask: bool = False, **_) -> dict[str, int]:
    """The sizes that a model needs to know of the task, from the options of `get_task` alone."""
    side = _SIDES.get(source, cifar.SIDE)
    return {"num_classes": 10, "vocab_size": 256, "max_len": side**2, "own_masks": legacy_mask}


def split_by(source: str, split: str) -> tuple[str, ...]:
    """Options that may move a training example into `split`; an evaluation must not do that."""
    del source
    return ("val_size",) if split == "validation" else ()


def get_task(
    *,
    data_dir: str | None = None,
    source: str = "cifar10",
    train_size: int = 45000,
    val_size: int = 5000,
    test_size: int = 10000,
    legacy_mask: bool = False,
) -> Task:
    """The image task: grey values 0 to 255 as ids, row by row, labelled with the class. Nothing is padded.

    Args:
      data_dir: folder of the data, original and converted, default $EFFICIENT_TX_DATA or ~/.cache/efficient_tx.
      source: "cifar10", prepared by TensorFlow Datasets in array_record, or one of `cifar.PLACES` in the data
        directory; "fashion_mnist", as fetched, 784 pixels; or the path of one of `cifar.PLACES`.
      train_size, val_size, test_size: number of images, or as many as there are; `Task.source` says how many.
        Validation takes the last of the training images; training and testing take the first ones. The order is that of
        the pictures' checksums, because CIFAR-10's archives and TensorFlow Datasets store them in different orders.
        (The arena's validation split is the last tenth in the order of TensorFlow Datasets.)
      legacy_mask: mask black pixels like padding, as the code of the arena and of the Skyformer paper does; the other
        pixels keep their positions.

    Raises:
      ValueError: a setting is out of range, or files are damaged.
      FileNotFoundError: the source is not there.
      OSError: the grey images cannot be stored.
    """
    at_least(1, train_size=train_size, val_size=val_size, test_size=test_size)
    place, root = _locate(source, data_dir), data_directory(data_dir) / "image"
    key = _fingerprint(place)
    known = sizes(source=source, legacy_mask=legacy_mask)
    training, testing = COUNTS.get(source, COUNTS["cifar10"])
    form = store.Form(
        pixels=store.Array("uint8", (training, known["max_len"]), 0, 255),
        labels=store.Array("uint8", (training,), 0, 9),
        test_pixels=store.Array("uint8", (testing, known["max_len"]), 0, 255),
        test_labels=store.Array("uint8", (testing,), 0, 9),
    )
    arrays = store.stored(root / f"{key}-{_READER}", lambda: _read(source, place), form)
    count = len(arrays["labels"])
    if val_size >= count:
        raise OptionError("val_size", val_size, f"of {count} images for training at least one has to be left")
    cuts = {"train": slice(0, min(train_size, count - val_size)), "validation": slice(count - val_size, count)}
    splits = [Images(arrays["pixels"][cut], arrays["labels"][cut], legacy_mask) for cut in cuts.values()]
    splits.append(Images(arrays["test_pixels"][:test_size], arrays["test_labels"][:test_size], legacy_mask))
    counts = "/".join(f"{len(split):,}" for split in splits)
    fitted = root / f"baselines-{key}-{_READER}-{counts.replace('/', '-').replace(',', '')}"
    accuracies = store.Form(constant=store.ACCURACY, linear=store.ACCURACY)
    baselines = store.stored(fitted, lambda: _baselines(splits[0], splits[2]), accuracies)
    return Task(
        *splits,
        kind=KIND,
        **known,
        name=("image-fashion_mnist" if source == "fashion_mnist" else "image") + "-legacy-mask" * legacy_mask,
        source=f"{source} in {place}, {counts} images" if source in COUNTS else f"{place}, {counts} images",
        baselines={name: float(accuracy) for name, accuracy in baselines.items()},
    )


def state(data_dir: str | None = None, source: str = "cifar10", **_: Any) -> tuple[bool, str]:
    """Whether the data are there, and where, or what is missing. Nothing is read."""
    try:
        return True, f"{source}: {_locate(source, data_dir)}"
    except (FileNotFoundError, ValueError) as error:
        return False, str(error)


class Images:
    """Flat grey images with labels, a random-access source. Item i is a view without a copy.

    Attributes:
      pixels: uint8 `[n, pixels]`.
      labels: uint8 `[n]`.
      legacy_mask: whether examples have a mask that is False at black pixels.
    """

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, legacy_mask: bool = False):
        self.pixels, self.labels, self.legacy_mask = pixels, labels, legacy_mask

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"inputs": uint8 `[pixels]`, "label": int}, "mask" if legacy. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        example = {"inputs": self.pixels[index], "label": int(self.labels[index])}
        return example | {"mask": self.pixels[index] > 0} if self.legacy_mask else example


def grey(colours: np.ndarray) -> np.ndarray:
    """uint8 `[..., 3]` -> uint8 `[...]`, as tf.image.rgb_to_grayscale, which the arena's code calls.

    In float32, bytes become fractions of 255 and are weighted; the result is the integer part of 255.5 times the sum. A
    value within float32's rounding of an integer may become the next integer below or above.
    """
    weights = np.array([0.2989, 0.5870, 0.1140], np.float32)
    fractions = colours.astype(np.float32) * np.float32(1 / 255)
    return (fractions @ weights * np.float32(255.5)).astype(np.uint8)


def _baselines(train: Images, test: Images) -> dict[str, np.ndarray]:
    """Test accuracy of the constant answer and of least squares on the pixels: one output per class, a small ridge."""
    print("image: fitting the linear baseline", file=sys.stderr, flush=True)
    size = train.pixels.shape[1] + 1
    gram, moment = np.zeros((size, size)), np.zeros((size, 10))
    for start in range(0, len(train), 8192):
        x = _with_one(train.pixels[start : start + 8192])
        gram += x.T @ x
        moment += x.T @ np.eye(10, dtype=np.float32)[train.labels[start : start + 8192]]
    weights = np.linalg.solve(gram + _RIDGE * np.eye(size), moment).astype(np.float32)
    answers = np.argmax(_with_one(test.pixels) @ weights, axis=1)
    constant = np.bincount(train.labels, minlength=10).argmax()
    return {"constant": np.mean(test.labels == constant), "linear": np.mean(test.labels == answers)}


def _with_one(pixels: np.ndarray) -> np.ndarray:
    return np.column_stack([pixels.astype(np.float32) / 255, np.ones(len(pixels), np.float32)])


def _locate(source: str, data_dir: str | None) -> pathlib.Path:
    """The folder or archive of a source.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is incomplete, or in a format that cannot be read by index.
    """
    root = data_directory(data_dir)
    if source == "fashion_mnist":
        return fetched.find(source, data_dir, "images")
    if source == "cifar10":
        if place := next((place for name in cifar.PLACES if (place := cifar.find(root / name))), None):
            return place
        if folder := prepared.find("cifar10", data_dir):
            return folder
        looked = ", ".join(str(place / "cifar10") for place in prepared.places(data_dir))
        raise FileNotFoundError(
            f"no CIFAR-10: {root} has none of {', '.join(cifar.PLACES)} (of www.cs.toronto.edu/~kriz/cifar.html), and "
            f"nothing is in {looked} ({prepared.command('cifar10')}); task.source=fashion_mnist takes fetched images"
        )
    if place := cifar.find(local_path(source)):
        return place
    raise FileNotFoundError(
        f"task.source={source!r}: neither cifar10 nor fashion_mnist, nor the path of one of {', '.join(cifar.PLACES)}"
    )


def _fingerprint(place: pathlib.Path) -> str:
    """A digest of the paths, sizes and modification times of a source's files."""
    files = [path for path in visible(place, "*") if path.is_file()] if place.is_dir() else [place]
    stats = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(repr(stats).encode(), digest_size=8).hexdigest()


def _read(source: str, place: pathlib.Path) -> dict[str, np.ndarray]:
    """pixels, labels, test_pixels, test_labels of a source, uint8, the pixels flat.

    Raises:
      ValueError: files are missing or damaged, or the data set is incomplete.
    """
    if source == "fashion_mnist":
        splits = [_idx(place, "train"), _idx(place, "t10k")]
    elif (place / "dataset_info.json").is_file():
        splits = [_prepared(place, split) for split in ("train", "test")]
    else:
        splits = [(grey(colours), labels) for colours, labels in cifar.read(place).values()]
    for (_, labels), expected in zip(splits, COUNTS.get(source, COUNTS["cifar10"]), strict=True):
        found = np.bincount(labels, minlength=10)
        if len(found) > 10 or not np.all(found == expected // 10):
            raise ValueError(f"{place} is not whole: {expected // 10:,} images of each class expected, not {found}")
    names = ("pixels", "labels", "test_pixels", "test_labels")
    return dict(zip(names, (array for split in splits for array in _ordered(*split)), strict=True))


def _ordered(pixels: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same in an order that depends on the pictures and their labels only."""
    contents = (row.tobytes() + bytes([label]) for row, label in zip(pixels, labels, strict=True))
    sums = b"".join(hashlib.blake2b(content, digest_size=8).digest() for content in contents)
    order = np.argsort(np.frombuffer(sums, ">u8"), kind="stable")
    return pixels[order], labels[order]


def _prepared(place: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = [], []
    for item in prepared.read(place, split, ("image", "label")):
        colours = np.asarray(item["image"])
        if colours.shape != (cifar.SIDE, cifar.SIDE, 3) or colours.dtype != np.uint8:
            raise ValueError(
                f"{place}, image {len(pixels)} of {split} is {colours.dtype} {list(colours.shape)}, not uint8 "
                f"[{cifar.SIDE}, {cifar.SIDE}, 3]"
            )
        pixels.append(grey(colours.reshape(-1, 3)))
        labels.append(item["label"])
    return np.array(pixels, np.uint8), _labels(labels, len(pixels), f"{place}, {split}")


def _labels(labels: Sequence, count: int, where: str) -> np.ndarray:
    try:
        return class_labels(labels, count=count, num_classes=10).astype(np.uint8)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _idx(place: pathlib.Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of files in MNIST's IDX format: a header of big-endian integers, then bytes."""
    side = _SIDES["fashion_mnist"]
    try:
        images = gzip.decompress((place / f"{split}-images-idx3-ubyte.gz").read_bytes())
        labels = gzip.decompress((place / f"{split}-labels-idx1-ubyte.gz").read_bytes())
        magic, count, *shape = np.frombuffer(images, ">i4", 4).tolist()
        if (magic, shape) != (2051, [side, side]) or np.frombuffer(labels, ">i4", 2).tolist() != [2049, count]:
            raise ValueError("another header expected")
        pixels = np.frombuffer(images, np.uint8, offset=16).reshape(count, side**2)
        labels = class_labels(np.frombuffer(labels, np.uint8, offset=8), count=count, num_classes=10)
    except Exception as error:  # a flipped bit makes the reader of gzip raise almost any error
        raise ValueError(
            f"{place} is damaged ({error}): python -m efficient_tx.data.fetch {place.name} gets it again"
        ) from None
    return pixels, labels
