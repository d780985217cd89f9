"""Data sets that TensorFlow Datasets prepared on this machine, read without TensorFlow."""

import contextlib
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from efficient_tx.files import local_path, visible
from efficient_tx.task import data_directory


def places(data_dir: str | os.PathLike | None) -> list[pathlib.Path]:
    """The folders where prepared data sets are searched: the data directory, then TensorFlow Datasets' own."""
    theirs = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return [data_directory(data_dir), local_path(theirs)]


def find(name: str, data_dir: str | os.PathLike | None) -> pathlib.Path | None:
    """The folder of the newest version of `name` ("cifar10", or "imdb_reviews/plain_text" with its configuration).

    Raises:
      ValueError: the data set is there, but only as TFRecords, which cannot be read by index; or its description is
        damaged.
    """
    unreadable = None
    for place in places(data_dir):
        versions = [path.parent for path in visible(place / name, "*/dataset_info.json")]
        for folder in sorted(versions, key=lambda path: [int(n) for n in path.name.split(".") if n.isdigit()])[::-1]:
            try:
                form = json.loads((folder / "dataset_info.json").read_text()).get("fileFormat")
            except (ValueError, AttributeError) as error:
                raise ValueError(f"{folder / 'dataset_info.json'} is damaged ({error}): {command(name)}") from None
            if form == "array_record":
                return folder
            unreadable = folder
    if unreadable:
        raise ValueError(
            f"{unreadable} is not stored as array_record, which reading by index needs: prepare it again with "
            f"{command(name)}, beside another data_dir or after removing that folder"
        )
    return None


def command(name: str) -> str:
    """The Python command that prepares a data set."""
    return f'tensorflow_datasets.builder("{name}", file_format="array_record").download_and_prepare()'


def records(
    folder: pathlib.Path, split: str, features: Collection[str], decoders: Mapping[str, Any] | None = None
) -> Sequence[dict[str, Any]]:
    """The examples of one split, read by index, in stored order.

    Args:
      features: names that each example must have.
      decoders: of tensorflow_datasets, by feature; other features are decoded as usual.

    Raises:
      ValueError: the folder has no such split or feature, or its files are missing or damaged.
    """
    with _naming(folder, split):
        return _open(folder, split, features, decoders)


def read(folder: pathlib.Path, split: str, features: Collection[str]) -> Iterator[dict[str, Any]]:
    """Yields the same examples in order; damage found later raises ValueError too."""
    with _naming(folder, split):
        yield from _open(folder, split, features)


def _open(
    folder: pathlib.Path, split: str, features: Collection[str], decoders: Mapping[str, Any] | None = None
) -> Sequence[dict[str, Any]]:
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder)
    if missing := [name for name in features if name not in builder.info.features]:
        raise ValueError(f"it has {', '.join(builder.info.features)}, but no {missing[0]}")
    return builder.as_data_source(split, decoders=decoders)


@contextlib.contextmanager
def _naming(folder: pathlib.Path, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # any error: a missing shard, damaged metadata, an unknown split
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{folder}: the split {split} cannot be read ({type(error).__name__}: {reason})") from None
