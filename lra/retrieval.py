"""Retrieval: do two documents belong together? Both are read byte by byte, up to 4,000 bytes of each.

The documents are papers in the ACL Anthology Network (Radev et al. 2013), and the question is whether one cites the
other; as a task of Long Range Arena, Tay et al. 2020 (arXiv:2011.04006). Without these files, the State of the Union
addresses from `python -m efficient_tx.data.fetch sotu` give a task of the same form with its own name: are two pieces
of 4 KB from the same address? There the splits have no address in common.
"""

import hashlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from efficient_tx.checks import at_least
from efficient_tx.data import fetched, order
from efficient_tx.files import local_path
from efficient_tx.task import Task, data_directory
from lra import ngrams, store
from lra.text import SYMBOLS

KIND = "token_pairs"
FILES = {"train": "new_aan_pairs.train.tsv", "val": "new_aan_pairs.eval.tsv", "test": "new_aan_pairs.test.tsv"}
PAIRS = {"train": 147086, "val": 18090, "test": 17437}  # of the ACL Anthology Network
PIECE = 4096  # bytes of an address in one document
SOTU_PAIRS = {"train": 20000, "val": 2000, "test": 4000}

_LONGEST = 10000  # the arena's code cuts papers here, before max_len
_SCANNED = 2**26
_JUDGED = 2000  # training pairs on which the baseline chooses its threshold
_BASELINES = "v2"  # part of the stored baselines' name: increase it with any change of their computation


def sizes(*, max_len: int, **_) -> dict[str, int]:
    """The sizes that a model needs to know of the task, from the options of `get_task` alone."""
    return {"num_classes": 2, "vocab_size": 257, "max_len": max_len}


def split_by(source: str, split: str) -> tuple[str, ...]:
    """Options that may move a training example into `split`; an evaluation must not do that."""
    del split
    return ("seed",) if source == "sotu" else ()


def get_task(
    *,
    data_dir: str | None = None,
    source: str = "aan",
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    max_len: int = 4000,
    bucket: bool = False,
    seed: int = 0,
) -> Task:
    """The retrieval task: the first `max_len` bytes of two documents as ids byte + 1, label 1 if they belong together.

    Args:
      data_dir: folder of data and baselines, default $EFFICIENT_TX_DATA or ~/.cache/efficient_tx.
      source: "aan", the three files of FILES in the data directory, or in `tsv_data` of an `lra_release` there; "sotu",
        the fetched addresses; or the path of a folder with such files or of an `lra_release`.
      train_size, val_size, test_size: number of pairs, or as many as a file has; None is all of them, for "sotu"
        SOTU_PAIRS.
      max_len: longer documents are cut to this many bytes.
      bucket: batches of similar lengths, with little padding.
      seed: of the splits and pairs of addresses; not used for files.

    Raises:
      ValueError: a setting is out of range, or a file is damaged.
      FileNotFoundError: the source is not there.
      OSError: the baselines cannot be stored.
    """
    counts = {"train": train_size, "val": val_size, "test": test_size}
    at_least(1, train_size=train_size, val_size=val_size, test_size=test_size, max_len=max_len)
    at_least(0, seed=seed)
    place = _locate(source, data_dir)
    splits: list[FilePairs | PiecePairs]
    if source == "sotu":
        name, described = "retrieval-sotu", f"sotu in {place}, seed {seed}"
        parts = _split(_addresses(place), seed)
        splits = [
            PiecePairs(part, counts[split] or SOTU_PAIRS[split], max_len, seed, number)
            for number, (split, part) in enumerate(zip(counts, parts))
        ]
    else:
        splits = [FilePairs(place / file, max_len) for file in FILES.values()]
        complete = {split: len(pairs) for split, pairs in zip(FILES, splits)} == PAIRS
        if source == "aan" and not complete:
            raise ValueError(
                f"{place} holds {'/'.join(f'{len(pairs):,}' for pairs in splits)} pairs, not the "
                f"{'/'.join(f'{count:,}' for count in PAIRS.values())} of the ACL Anthology Network: it is not whole; "
                "for other pairs in this form give its path as task.source"
            )
        name, described = "retrieval" if complete else f"retrieval-{place.resolve().name}", str(place)
        splits = [pairs.first(size) for pairs, size in zip(splits, counts.values())]
    return Task(
        *splits,
        kind=KIND,
        **sizes(max_len=max_len),
        name=name,
        source=f"{described}, {'/'.join(f'{len(pairs):,}' for pairs in splits)} pairs",
        bucket=bucket,
        baselines=_baselines(splits[0], splits[2], data_directory(data_dir) / "retrieval"),
        symbols=SYMBOLS,
    )


def state(data_dir: str | None = None, source: str = "aan", **_: Any) -> tuple[bool, str]:
    """Whether the data are there, and where, or what is missing. Nothing is read."""
    try:
        return True, f"{source}: {_locate(source, data_dir)}"
    except FileNotFoundError as error:
        return False, str(error)


class FilePairs:
    """The pairs of a file, one per line: label, two names, two texts, separated by tabs. Texts are read on access.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line has no label 0.0 or 1.0, two names and two texts.
    """

    def __init__(self, path: pathlib.Path, max_len: int):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file (retrieval needs {', '.join(FILES.values())})")
        self.path, self.max_len = path, max_len
        self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        newlines, tabs = self._separators()
        self._offsets = np.append(0, newlines + 1)
        if self._offsets[-1] < len(self._bytes):
            self._offsets = np.append(self._offsets, len(self._bytes))
        first = np.searchsorted(tabs, self._offsets)
        fields = np.diff(first) + 1
        wrong = np.flatnonzero(fields != 5)
        if len(wrong) or not len(fields):
            line, found = (wrong[0] + 1, fields[wrong[0]]) if len(wrong) else (1, 0)
            raise ValueError(
                f"{path}, line {line}: expected a label, two names and two texts with tabs between them, found {found} "
                "fields"
            )
        self.labels = self._read_labels(tabs[first[:-1]])

    def _separators(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of newlines and tabs in the file, int64. Read in blocks: the file may be larger than the memory."""
        found = {letter: [np.zeros(0, np.int64)] for letter in "\n\t"}
        for start in range(0, len(self._bytes), _SCANNED):
            block = self._bytes[start : start + _SCANNED]
            for letter, places in found.items():
                places.append(start + np.flatnonzero(block == ord(letter)))
        return tuple(np.concatenate(places) for places in found.values())

    def _read_labels(self, ends: np.ndarray) -> np.ndarray:
        """uint8 `[n]`, from the first field of each line, which ends at `ends`: 0 or 1, with or without ".0"."""
        starts = self._offsets[:-1]
        first, second, third = (self._bytes[starts + i] for i in range(3))
        whole = ends - starts == 1
        decimal = (ends - starts == 3) & (second == ord(".")) & (third == ord("0"))
        wrong = np.flatnonzero(~(((first == ord("0")) | (first == ord("1"))) & (whole | decimal)))
        if len(wrong):
            label = self._bytes[starts[wrong[0]] : ends[wrong[0]]].tobytes()
            raise ValueError(f"{self.path}, line {wrong[0] + 1}: its label is {label!r}, expected 0.0 or 1.0")
        return (first == ord("1")).astype(np.uint8)

    def first(self, count: int | None) -> "FilePairs":
        """Keeps at most the first `count` pairs, and returns self."""
        self.labels = self.labels[:count]
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def texts(self, index: int) -> tuple[bytes, bytes]:
        """Both texts, cut. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        line = self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes().rstrip(b"\r\n")
        length = min(self.max_len, _LONGEST)
        return tuple(text[:length] for text in line.split(b"\t")[3:])

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        """{"inputs", "inputs2": uint16 `[length]`, "label": int}."""
        return _example(*self.texts(index), self.labels[index])


class PiecePairs:
    """Pairs of pieces of the same address (label 1) or of two (label 0). Pair i is a pure function of (seed, split, i).

    Each piece is uniform over all pieces for both labels (except for the longest addresses), so one piece alone does
    not tell the label.

    Args:
      addresses: the pieces of each address; at least two addresses of at least two pieces.
      count: number of pairs.
      max_len: pieces are cut to this many bytes.
      seed, split: determine the pairs.
    """

    def __init__(self, addresses: Sequence[Sequence[bytes]], count: int, max_len: int, seed: int, split: int):
        self.pieces = [piece[:max_len] for address in addresses for piece in address]
        lengths = np.array([len(address) for address in addresses])
        self._address = np.repeat(np.arange(len(addresses)), lengths)
        self._starts, self._lengths = np.cumsum(lengths) - lengths, lengths
        self._count, self._seed, self._split = count, seed, split

    def __len__(self) -> int:
        return self._count

    def draw(self, index: int) -> tuple[int, int, int]:
        """Two pieces and their label. Raises IndexError outside [0, len)."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        # Only `random` is drawn: its stream is as stable over NumPy versions as the bit generator's.
        label, one, two = np.random.default_rng([self._seed, self._split, index]).random(3)
        first = int(one * len(self.pieces))
        start, length = (int(part[self._address[first]]) for part in (self._starts, self._lengths))
        if label < 0.5:
            second = int(two * (len(self.pieces) - length))
            return first, second + length * (second >= start), 0
        second = start + int(two * (length - 1))
        return first, second + (second >= first), 1

    @property
    def labels(self) -> np.ndarray:
        """Labels of all pairs, uint8 `[n]`."""
        return np.array([self.draw(index)[2] for index in range(len(self))], np.uint8)

    def texts(self, index: int) -> tuple[bytes, bytes]:
        """Both pieces."""
        first, second, _ = self.draw(index)
        return self.pieces[first], self.pieces[second]

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        """{"inputs", "inputs2": uint16 `[length]`, "label": int}."""
        first, second, label = self.draw(index)
        return _example(self.pieces[first], self.pieces[second], label)


def _example(one: bytes, two: bytes, label: int) -> dict[str, np.ndarray | int]:
    ids = (np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(1) for text in (one, two))
    return {"inputs": next(ids), "inputs2": next(ids), "label": int(label)}


def _baselines(
    train: FilePairs | PiecePairs, test: FilePairs | PiecePairs, directory: pathlib.Path
) -> dict[str, float]:
    """Test accuracy of the constant answer and of the similarity in byte n-grams, stored under the data's digest."""
    digest = hashlib.blake2b(digest_size=16)
    judged = np.unique(np.linspace(0, len(train) - 1, _JUDGED).astype(int))
    train_labels, test_labels = train.labels, test.labels
    for pairs, chosen in ((train, judged), (test, range(len(test)))):
        for index in chosen:
            for text in pairs.texts(int(index)):
                digest.update(len(text).to_bytes(8, "little") + text)
    digest.update(train_labels.tobytes() + test_labels.tobytes())

    def compute() -> dict[str, np.ndarray]:
        print("retrieval: fitting the baseline of byte n-grams", file=sys.stderr, flush=True)
        known = ngrams.Similarity(train.texts(int(index)) for index in judged)
        scores = np.array([known(*train.texts(int(index))) for index in judged])
        threshold = ngrams.threshold(scores, train_labels[judged])
        answers = np.array([known(*test.texts(index)) for index in range(len(test))]) > threshold
        return {"similarity": np.array(np.mean(answers == test_labels))}

    place = directory / f"baselines-{digest.hexdigest()}-{_BASELINES}"
    stored = store.stored(place, compute, store.Form(similarity=store.ACCURACY))
    constant = np.bincount(train_labels, minlength=2).argmax()
    return {"constant": float(np.mean(test_labels == constant)), "n-gram similarity": float(stored["similarity"])}


def _locate(source: str, data_dir: str | None) -> pathlib.Path:
    """The folder of a source. Raises FileNotFoundError."""
    if source == "sotu":
        return fetched.find("sotu", data_dir, "addresses")
    folder = data_directory(data_dir) if source == "aan" else local_path(source)
    inside = ("lra_release/lra_release/tsv_data", "lra_release/tsv_data", "tsv_data", ".")
    places = [folder / place for place in inside]
    for place in places:
        if all((place / file).is_file() for file in FILES.values()):
            return place
    hint = "; task.source=sotu takes fetched addresses instead" if source == "aan" else ""
    origin = "task.source=aan" if source == "aan" else f"task.source={source!r}, neither aan nor sotu"
    raise FileNotFoundError(
        f"{origin}: no {FILES['train']} with {FILES['val']} and {FILES['test']} (of Long Range Arena's "
        f"lra_release.gz, folder tsv_data) in {', '.join(str(place) for place in places)}{hint}"
    )


def _addresses(place: pathlib.Path) -> dict[str, list[bytes]]:
    """File name -> its pieces of PIECE bytes, without the rest at the end. Addresses of one piece are left out.

    Raises:
      ValueError: a file is missing or differs from what was fetched.
    """
    return {
        name: [text[i : i + PIECE] for i in range(0, len(text) - PIECE + 1, PIECE)]
        for name, text in fetched.read(place)
        if len(text) >= 2 * PIECE
    }


def _split(addresses: dict[str, list[bytes]], seed: int) -> list[list[list[bytes]]]:
    """Splits the addresses by `seed`: eight tenths for training, a tenth for validation, a tenth for testing."""
    names = sorted(addresses, key=lambda name: order.place(name.encode(), seed))
    cut = len(names) // 10
    if cut < 2:
        raise ValueError(f"{len(names)} addresses of two pieces or more: a split needs two, so there must be 20")
    parts = (names[2 * cut :], names[cut : 2 * cut], names[:cut])
    return [[addresses[name] for name in part] for part in parts]
