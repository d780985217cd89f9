"""Text: is a film review positive? It is read byte by byte, up to 4,000 bytes.

Maas et al. 2011 (IMDb), as a task of Long Range Arena, Tay et al. 2020 (arXiv:2011.04006). Without IMDb, the e-mails
from `python -m efficient_tx.data.fetch spam` give a task of the same form with its own name.
"""

import hashlib
import pathlib
import sys
from typing import Any

import numpy as np

from efficient_tx.checks import OptionError, at_least
from efficient_tx.data import emails, fetched, order, prepared
from efficient_tx.data.emails import Labelled
from efficient_tx.data.labels import class_labels
from efficient_tx.files import local_path, visible
from efficient_tx.task import Task, data_directory
from lra import ngrams, store

KIND = "tokens"
SYMBOLS = ("<pad>", *(repr(bytes([byte]))[2:-1] for byte in range(256)))  # of the ids byte + 1
REVIEWS = 25000  # of IMDb, in the training split and in the test split

_CLASSES = ("neg", "pos")
_IMDB = "imdb_reviews/plain_text"
_BASELINES = "v1"  # part of the stored baselines' name: increase it with any change of their computation


def sizes(*, max_len: int, **_) -> dict[str, int]:
    """The sizes that a model needs to know of the task, from the options of `get_task` alone."""
    return {"num_classes": 2, "vocab_size": 257, "max_len": max_len}


def split_by(source: str, split: str) -> tuple[str, ...]:
    """Options that may move a training example into `split`; an evaluation must not do that."""
    if split == "validation":
        return ("val_size", "validation", "seed")
    return ("seed",) if source == "spam" else ()


def get_task(
    *,
    data_dir: str | None = None,
    source: str = "imdb",
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    max_len: int = 4000,
    validation: str = "split",
    bucket: bool = False,
    seed: int = 0,
) -> Task:
    """The text task: the first `max_len` bytes of a text as ids byte + 1, labelled 1 if it is positive (or spam).

    Args:
      data_dir: folder of data and baselines, default $EFFICIENT_TX_DATA or ~/.cache/efficient_tx.
      source: "imdb", prepared by TensorFlow Datasets in array_record, or the unpacked `aclImdb` in the data directory;
        "spam", the fetched e-mails; or the path of a folder in the form of `aclImdb`.
      train_size, test_size: number of texts, or as many as there are; None is all. `Task.source` says how many. A fifth
        of the e-mails is for testing, for any sizes.
      val_size: number of texts, or as many as there are; None is a tenth of the training texts, or all test texts with
        validation="test".
      max_len: longer texts are cut to this many bytes.
      validation: "split" holds out a part of the training texts; "test" validates on test texts. The code of the arena
        and of the Skyformer paper does the latter; a checkpoint chosen that way has seen the test.
      bucket: batches of similar lengths, with little padding.
      seed: of the splits, which depend neither on the order of files nor on max_len. Equal texts are neighbours in the
        drawn order, so hardly any is in two splits.

    Raises:
      ValueError: a setting is out of range, or files are damaged.
      FileNotFoundError: the source is not there.
      OSError: the baselines cannot be stored.
    """
    at_least(1, train_size=train_size, val_size=val_size, test_size=test_size, max_len=max_len)
    at_least(0, seed=seed)
    if validation not in ("split", "test"):
        raise ValueError(f'validation is {validation!r}: it must be "split" or "test"')
    place = _locate(source, data_dir)
    if source == "spam":
        name, everything = "text-spam", _ordered(emails.bodies(place), seed)
        cut = max(len(everything) // 5, 1)
        test, pool = everything[:cut], everything[cut:]
    else:
        pool, test = (_ordered(_reviews(place, split), seed) for split in ("train", "test"))
        complete = len(pool) == len(test) == REVIEWS
        if source == "imdb" and not complete:
            raise ValueError(
                f"{place} holds {len(pool):,} and {len(test):,} reviews, IMDb {REVIEWS:,} and {REVIEWS:,}: it is not "
                "whole; for other texts in this form give its path as task.source"
            )
        name = "text" if complete else f"text-{place.resolve().name}"
    test = test[:test_size]
    cut = 0
    if validation == "split":
        cut = max(len(pool) // 10, 1) if val_size is None else val_size
        if cut >= len(pool):
            raise OptionError("val_size", cut, f"of {len(pool)} training texts at least one has to be left")
    held_out = test[:val_size] if validation == "test" else pool[:cut]
    train = pool[cut:][:train_size]
    counts = "/".join(f"{len(split):,}" for split in (train, held_out, test))
    described = f"{source} in {place}" if source in ("imdb", "spam") else str(place)
    splits = [Texts(split, max_len) for split in (train, held_out, test)]
    return Task(
        *splits,
        kind=KIND,
        **sizes(max_len=max_len),
        name=name,
        source=f"{described}, {counts} texts, seed {seed}" + ", validated on test texts" * (validation == "test"),
        bucket=bucket,
        baselines=_baselines(splits[0], splits[2], data_directory(data_dir) / "text"),
        symbols=SYMBOLS,
    )


def state(data_dir: str | None = None, source: str = "imdb", **_: Any) -> tuple[bool, str]:
    """Whether the data are there, and where, or what is missing. Nothing is read."""
    try:
        return True, f"{source}: {_locate(source, data_dir)}"
    except (FileNotFoundError, ValueError) as error:
        return False, str(error)


class Texts:
    """Labelled texts as byte ids, a random-access source.

    Attributes:
      texts: the whole texts, as bytes.
      labels: uint8 `[n]`.
      max_len: longer texts are cut to this many bytes.
    """

    def __init__(self, texts: Labelled, max_len: int):
        self.texts = [text for text, _ in texts]
        self.labels = np.array([label for _, label in texts], np.uint8)
        self.max_len = max_len

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        """{"inputs": uint16 `[length]`, "label": int}. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        inputs = np.frombuffer(self.texts[index], np.uint8, min(len(self.texts[index]), self.max_len))
        return {"inputs": inputs.astype(np.uint16) + np.uint16(1), "label": int(self.labels[index])}

    def cut(self) -> list[bytes]:
        """The texts, cut to `max_len` bytes."""
        return [text[: self.max_len] for text in self.texts]


def _ordered(texts: Labelled, seed: int) -> Labelled:
    """The texts in an order that depends on the seed and the texts only; equal ones are neighbours."""
    return sorted(texts, key=lambda item: (order.place(item[0], seed), item[1]))


def _baselines(train: Texts, test: Texts, directory: pathlib.Path) -> dict[str, float]:
    """Test accuracy of the constant answer and of a linear model of byte n-grams, stored under the data's digest."""
    digest = hashlib.blake2b(digest_size=16)
    for split in (train, test):
        for text in split.cut():
            digest.update(len(text).to_bytes(8, "little") + text)
        digest.update(split.labels.tobytes())

    def compute() -> dict[str, np.ndarray]:
        print("text: fitting the baseline of byte n-grams", file=sys.stderr, flush=True)
        return {"ngrams": np.array(ngrams.accuracy(train.cut(), train.labels, test.cut(), test.labels))}

    constant = np.bincount(train.labels, minlength=2).argmax()
    result = {"constant": float(np.mean(test.labels == constant))}
    if 0 < train.labels.mean() < 1:
        place = directory / f"baselines-{digest.hexdigest()}-{_BASELINES}"
        stored = store.stored(place, compute, store.Form(ngrams=store.ACCURACY))
        result["byte n-grams"] = float(stored["ngrams"])
    return result


def _locate(source: str, data_dir: str | None) -> pathlib.Path:
    """The folder of a source.

    Raises:
      FileNotFoundError: it is not there.
      ValueError: it is in a format that cannot be read by index.
    """
    root = data_directory(data_dir)
    if source == "spam":
        return fetched.find("spam", data_dir, "e-mails")
    if source == "imdb":
        unpacked = root / "aclImdb"
        if (unpacked / "train").is_dir():
            return _with_all_folders(unpacked)
        if folder := prepared.find(_IMDB, data_dir):
            return folder
        looked = ", ".join(str(place / _IMDB) for place in prepared.places(data_dir))
        raise FileNotFoundError(
            f"no IMDb reviews, neither in {unpacked} (aclImdb_v1.tar.gz of ai.stanford.edu/~amaas/data/sentiment, "
            f"unpacked) nor in {looked} ({prepared.command(_IMDB)}); task.source=spam takes fetched e-mails instead"
        )
    folder = local_path(source)
    for place in (folder, folder / "aclImdb"):
        if (place / "train").is_dir():
            return _with_all_folders(place)
    raise FileNotFoundError(
        f"task.source={source!r}: neither imdb nor spam, nor a folder that holds train/pos/*.txt, train/neg/*.txt, "
        "test/pos/*.txt and test/neg/*.txt, as the unpacked aclImdb_v1.tar.gz does"
    )


def _with_all_folders(place: pathlib.Path) -> pathlib.Path:
    for folder in (place / split / name for split in ("train", "test") for name in _CLASSES):
        if not visible(folder, "*.txt"):
            raise FileNotFoundError(f"{folder}: no *.txt there, as the unpacked aclImdb_v1.tar.gz has")
    return place


def _reviews(place: pathlib.Path, split: str) -> Labelled:
    """The reviews of "train" or "test", from a prepared data set or from files."""
    if (place / "dataset_info.json").is_file():
        items = list(prepared.read(place, split, ("text", "label")))
        try:
            labels = class_labels([item["label"] for item in items], count=len(items), num_classes=2).tolist()
        except ValueError as error:
            raise ValueError(f"{place}, {split}: {error}") from None
        if other := {type(item["text"]).__name__ for item in items} - {"bytes"}:
            raise ValueError(f"{place}, {split}: its texts are {min(other)}, not bytes")
        return [(item["text"], label) for item, label in zip(items, labels)]
    texts: Labelled = []
    for label, name in enumerate(_CLASSES):
        texts += [(path.read_bytes(), label) for path in visible(place / split / name, "*.txt")]
    return texts
