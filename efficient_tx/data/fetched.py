"""Data sets that `python -m efficient_tx.data.fetch` has stored in the data directory; see its docstring."""

import hashlib
import pathlib
from collections.abc import Iterator

from efficient_tx.task import data_directory

_SUMS = "SHA256SUMS"


def find(name: str, data_dir: str | None, items: str) -> pathlib.Path:
    """The folder of a data set. Raises FileNotFoundError, with the name `items` of its contents, if it is not there."""
    folder = data_directory(data_dir) / name
    if not (folder / _SUMS).is_file():
        raise FileNotFoundError(f"no {items} in {folder}: python -m efficient_tx.data.fetch {name} gets them")
    return folder


def read(folder: pathlib.Path) -> Iterator[tuple[str, bytes]]:
    """(path within the folder, content) of each of its files.

    Raises:
      ValueError: a file is missing or differs from what was fetched.
    """
    for line in (folder / _SUMS).read_text().splitlines():
        checksum, _, name = line.partition("  ")
        path = folder / name
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != checksum:
            fetch = f"python -m efficient_tx.data.fetch {folder.name}"
            raise ValueError(f"{path} is missing or damaged: {fetch} gets it again")
        yield name, content
