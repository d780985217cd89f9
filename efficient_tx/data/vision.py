"""Images with one label each: Fashion-MNIST, CIFAR-10 and ImageNet-1k, and their augmentation in training.

Pixels are float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1, as in big_vision (value_range(-1, 1)).
"""

import dataclasses
import gzip
import os
import pathlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from efficient_tx.checks import OptionError, at_least
from efficient_tx.data import prepared
from efficient_tx.data.labels import class_labels
from efficient_tx.data.pictures import AUGMENTATIONS, Picture, normalise
from efficient_tx.task import Example, Source, Task, data_directory

KIND = "image"


@dataclasses.dataclass(frozen=True)
class Collection:
    """Images that can be read.

    Attributes:
      title: its name and who made it.
      num_classes: labels are in [0, num_classes).
      side: default side of the square images that a model gets.
      channels: 1, grey, or 3.
      margin: smaller side of an image divided by the side of the square in its middle that evaluation uses.
      val_size: default number of training images that are held out.
      in_order: True: the last ones in stored order are held out. False: they are drawn with the task's seed.
      read: (name, directory of data) -> the images of the training and the test split, each {"image": uint8 [height,
        width, channels] or the bytes of a file, "label": int}.
    """

    title: str
    num_classes: int
    side: int
    channels: int
    margin: float
    val_size: int
    in_order: bool
    read: Callable[[str, pathlib.Path], tuple[Sequence, Sequence]]


def sizes(
    *,
    source: str = "fashion_mnist",
    image_size: int | None = None,
    augment: str = "none",
    mixup: float = 0.0,
    seed: int = 0,
    **_,
) -> dict:
    """The sizes that a model needs to know of the task, from the options alone; raises ValueError as `get_task`."""
    for name, value, known in [("source", source, COLLECTIONS), ("augment", augment, AUGMENTATIONS)]:
        if value not in known:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(known)}")
    at_least(1, image_size=image_size)
    at_least(0, seed=seed)
    if not 0 <= mixup < float("inf"):
        raise OptionError("mixup", mixup, "it must be 0 (none) or a positive number")
    collection = COLLECTIONS[source]
    side = image_size or collection.side
    return {
        "num_classes": collection.num_classes,
        "vocab_size": None,
        "max_len": side * side,
        "image_shape": (side, side, collection.channels),
    }


def split_by(source: str, split: str) -> tuple[str, ...]:
    """Options that may move a training example into `split`; an evaluation must not do that."""
    del source
    return ("val_size", "seed") if split == "validation" else ()


def get_task(
    *,
    data_dir: str | os.PathLike | None = None,
    source: str = "fashion_mnist",
    image_size: int | None = None,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    augment: str = "none",
    mixup: float = 0.0,
    seed: int = 0,
) -> Task:
    """Images of one collection. Validation images come from its training images, test images from its test split.

    Args:
      data_dir: folder of the data, default $EFFICIENT_TX_DATA or ~/.cache/efficient_tx.
      source: "fashion_mnist", "cifar10" or "imagenet2012". Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747) is below
        data_dir as data.fetch stores it. CIFAR-10 (Krizhevsky 2009) and ImageNet (Russakovsky et al. 2014, arXiv
        1409.0575) are prepared by tensorflow_datasets in the file format array_record, below data_dir, $TFDS_DATA_DIR
        or ~/tensorflow_datasets. ImageNet's test split is its validation set.
      image_size: side of the images that a model gets; None is 28, 32 or 224, by source.
      train_size, test_size: number of images; None is all that are left.
      val_size: number of training images that are held out; None is 5,000, for ImageNet 12,812. They are drawn with
        `seed`; for ImageNet they are the last in stored order, 1 % as in Beyer et al. 2022 (arXiv 2205.01580).
      augment: a key of `pictures.AUGMENTATIONS`: "none"; "flip", mirror images; "flip_crop", mirror images and shifts
        by up to an eighth of the side; "inception", random crops and mirror images; "randaugment", as "inception" and
        then RandAugment(2, 10).
      mixup: α of the Beta(α, α) from which the weight of a second image is drawn; 0 is none. Every training image is a
        mixture of two (Zhang et al. 2017, arXiv 1710.09412), with weights λ and 1 − λ, λ ~ Beta(α, α) and at least 1/2
        as in big_vision. Unlike there, λ is drawn for each image, and the partner is any image of the split, not the
        next one of the batch. So a row of a batch needs no other row, but twice as many images are decoded and
        augmented.
      seed: of the validation split.

    Raises:
      ValueError: a setting is out of range, the collection has fewer images, or a file is damaged.
      FileNotFoundError: the images are not there.
    """
    at_least(1, train_size=train_size, val_size=val_size, test_size=test_size)
    model = sizes(source=source, image_size=image_size, augment=augment, mixup=mixup, seed=seed)
    collection, shape = COLLECTIONS[source], model["image_shape"]
    training, testing = collection.read(source, data_directory(data_dir))
    val_size = collection.val_size if val_size is None else val_size
    counts = {
        "train": len(training) - val_size if train_size is None else train_size,
        "val": val_size,
        "test": len(testing) if test_size is None else test_size,
    }
    if counts["train"] < 1:
        raise OptionError("val_size", val_size, f"of {len(training)} images for training at least one has to be left")
    for names, images in [(("train", "val"), training), (("test",), testing)]:
        if sum(counts[name] for name in names) > len(images):
            asked = " and ".join(f"{name}_size={counts[name]}" for name in names)
            raise ValueError(f"{asked}: {source} has {len(images)} images for that")
    # Not `permutation`: over its versions NumPy keeps the stream of `random` only.
    order = np.arange(len(training))
    if not collection.in_order:
        order = np.argsort(np.random.default_rng(seed).random(len(training)), kind="stable")
    places = {
        "train": (training, order[: counts["train"]]),
        "val": (training, order[len(order) - val_size :]),
        "test": (testing, np.arange(counts["test"])),
    }
    train, validation, test = (Images(*place, shape, collection.margin, source) for place in places.values())
    return Task(
        train,
        validation,
        test,
        kind=KIND,
        name=source,
        source=f"{collection.title}, {'/'.join(str(count) for count in counts.values())} images",
        baselines=_baselines(train, test, collection.num_classes),
        augment=None if augment == "none" and not mixup else Augment(train, augment, mixup),
        **model,
    )


class Images:
    """Some images of a collection, a random-access source: item i is {"inputs": Picture, "label": int}."""

    def __init__(self, stored: Sequence, order: np.ndarray, shape: tuple[int, int, int], margin: float, name: str):
        self.stored, self.order, self.shape, self.margin, self.name = stored, order, shape, margin, name

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Example:
        place = int(self.order[index])
        record = self.stored[place]
        picture = Picture(record["image"], self.shape, self.margin, f"{self.name}, stored image {place},")
        return {"inputs": picture, "label": record["label"]}


class Augment:
    """The augmentation of a picture in training: see `get_task`. Mixup draws partners from the split `train`."""

    def __init__(self, train: Source, name: str, mixup: float):
        self.train, self.draw, self.mixup = train, AUGMENTATIONS[name], mixup

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        inputs = normalise(self.draw(example["inputs"], rng))
        if not self.mixup:
            return {**example, "inputs": inputs}
        partner = self.train[int(rng.integers(len(self.train)))]
        share = rng.beta(self.mixup, self.mixup)
        share = np.float32(max(share, 1 - share))
        inputs = share * inputs + (1 - share) * normalise(self.draw(partner["inputs"], rng))
        return {**example, "inputs": inputs, "label2": partner["label"], "mix": share}


class Arrays:
    """Images in memory, uint8 `[n, side, side, channels]`, and their labels `[n]`, as a sequence of records.

    Raises:
      ValueError: their shapes or labels are not those of the collection; the line begins with `where`.
    """

    def __init__(self, images: np.ndarray, labels: Any, collection: "Collection", where: str):
        shape = (len(images), collection.side, collection.side, collection.channels)
        if images.shape != shape:
            raise ValueError(f"{where}: images of shape {list(images.shape)}, not {list(shape)}")
        try:
            labels = class_labels(labels, count=len(images), num_classes=collection.num_classes)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images[index], "label": self.labels[index]}


def _baselines(train: Images, test: Images, num_classes: int) -> dict[str, float]:
    """Accuracy of the most frequent label and, for images in memory, of the nearest class mean, pixel by pixel.

    For ImageNet no label is read: each class has the same number of images.
    """
    if not isinstance(train.stored, Arrays):
        return {"constant": 1 / num_classes}
    labels, truth = train.stored.labels[train.order], test.stored.labels[test.order]
    pixels, queries = (split.stored.images[split.order].reshape(len(split), -1) for split in (train, test))
    present = np.unique(labels)
    means = np.stack([pixels[labels == label].mean(axis=0) for label in present])
    distance = (means**2).sum(axis=1) - 2 * queries.astype(np.float64) @ means.T
    return {
        "constant": float((truth == np.bincount(labels).argmax()).mean()),
        "nearest class mean": float((truth == present[distance.argmin(axis=1)]).mean()),
    }


def _read_fashion(name: str, root: pathlib.Path) -> tuple[Arrays, Arrays]:
    """The four files of data.fetch, in the format of the MNIST database."""
    folder = root / name
    splits = []
    for split in ("train", "t10k"):
        images = _read_idx(folder / f"{split}-images-idx3-ubyte.gz", axes=3)
        labels = _read_idx(folder / f"{split}-labels-idx1-ubyte.gz", axes=1)
        splits.append(Arrays(images[..., None], labels, COLLECTIONS[name], f"{folder}, {split}"))
    return tuple(splits)


def _read_idx(path: pathlib.Path, axes: int) -> np.ndarray:
    """A file of bytes: magic number 2048 + axes, then the axes' lengths, each a big-endian int32, then the values."""
    fetch = f"python -m efficient_tx.data.fetch fashion_mnist --data_dir={path.parent.parent}"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: {fetch} puts it there")
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}): {fetch} makes it whole") from None
    header = np.frombuffer(content[: 4 + 4 * axes].ljust(4 + 4 * axes, b"\0"), ">i4")
    values, shape = np.frombuffer(content[4 + 4 * axes :], np.uint8), header[1:]
    if header[0] != 2048 + axes or (shape < 0).any() or values.size != np.prod(shape):
        raise ValueError(f"{path} is damaged (no idx file of {axes} axes): {fetch} makes it whole")
    return values.reshape(shape)


def _read_prepared(name: str, root: pathlib.Path) -> tuple[Sequence, Sequence]:
    """Two splits prepared by tensorflow_datasets, with undecoded images."""
    import tensorflow_datasets as tfds

    folder = prepared.find(name, root)
    if folder is None:
        archives = " with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of image-net.org in its downloads/manual"
        raise FileNotFoundError(
            f"{name} is in none of {', '.join(str(place / name) for place in prepared.places(root))}: prepare it once, "
            f"where tensorflow is installed{archives * (name == 'imagenet2012')}: {prepared.command(name)}"
        )
    test = "validation" if name == "imagenet2012" else "test"
    decoders = {"image": tfds.decode.SkipDecoding()}
    return tuple(prepared.records(folder, split, ("image", "label"), decoders) for split in ("train", test))


def _read_into_memory(name: str, root: pathlib.Path) -> tuple[Arrays, Arrays]:
    """The same, with all images decoded into memory once."""
    collection = COLLECTIONS[name]
    shape = (collection.side, collection.side, collection.channels)
    splits = []
    for split, records in zip(("train", "test"), _read_prepared(name, root)):
        images = []
        for i, record in enumerate(records):
            where = f"{name}, stored image {i},"
            images.append(np.asarray(Picture(record["image"], shape, name=where).image()))
            if images[-1].shape != shape:
                raise ValueError(f"{where} has the shape {list(images[-1].shape)}, not {list(shape)}")
        labels = [record["label"] for record in records]
        splits.append(Arrays(np.stack(images), labels, collection, f"{name}, {split}"))
    return tuple(splits)


COLLECTIONS = {
    "fashion_mnist": Collection(
        "Fashion-MNIST (Zalando)", 10, 28, 1, margin=1, val_size=5000, in_order=False, read=_read_fashion
    ),
    "cifar10": Collection("CIFAR-10", 10, 32, 3, margin=1, val_size=5000, in_order=False, read=_read_into_memory),
    "imagenet2012": Collection(
        "ImageNet-1k", 1000, 224, 3, margin=256 / 224, val_size=12812, in_order=True, read=_read_prepared
    ),
}
