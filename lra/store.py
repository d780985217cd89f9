"""Arrays that are made on first use and stored once, safe against kills and concurrent runs."""

import contextlib
import dataclasses
import errno
import fcntl
import math
import os
import pathlib
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import numpy as np

Arrays = Mapping[str, np.ndarray]

_FILE = "data.npz"
_TEMPORARY = ".writing-"


@dataclasses.dataclass(frozen=True)
class Array:
    """What an array has to be.

    Attributes:
      dtype: its name.
      shape: its axes; None is any length.
      least, most: all values are in [least, most].
    """

    dtype: str
    shape: tuple[int | None, ...]
    least: float
    most: float

    def fault(self, array: np.ndarray) -> str | None:
        """What is wrong with `array`, in words that follow its name."""
        fits = len(array.shape) == len(self.shape) and all(n in (m, None) for m, n in zip(array.shape, self.shape))
        if array.dtype != self.dtype or not fits:
            return f"is {array.dtype} {list(array.shape)}, not {self.dtype} {list(self.shape)}".replace("None", "any")
        # Not `<`: a comparison with NaN is false. A limit of the dtype needs no look at the values.
        limits = np.iinfo(array.dtype) if array.dtype.kind in "iu" else np.finfo(array.dtype)
        wrong = array.size and (
            (self.least > limits.min and not (value := array.min()) >= self.least)
            or (self.most < limits.max and not (value := array.max()) <= self.most)
        )
        return f"holds {value}, which is not in [{self.least}, {self.most}]" if wrong else None


class Form:
    """A check that arrays have these names and are what is said of each.

    Raises:
      ValueError: (on call) the first fault, in words.
    """

    def __init__(self, **expected: Array):
        self.expected = expected

    def __call__(self, arrays: Arrays) -> None:
        if arrays.keys() != self.expected.keys():
            raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}, not {', '.join(self.expected)}")
        for name, array in arrays.items():
            if fault := self.expected[name].fault(array):
                raise ValueError(f"{name} {fault}")


ACCURACY = Array("float64", (), 0, 1)


def stored(
    directory: pathlib.Path, make: Callable[[], dict[str, np.ndarray]], check: Callable[[Arrays], None]
) -> dict[str, np.ndarray]:
    """The arrays in `directory`/data.npz; they are made and written there if they are missing or damaged.

    They are read-only and memory-mapped: gigabytes open in seconds, and only parts that are used take memory. The file
    appears complete or not at all, and its checksums are verified on every load. One process makes the data while
    others wait for it; files that a killed process left are removed.

    Args:
      directory: of the file; it is created.
      make: makes the arrays.
      check: raises ValueError, a fault in words, for arrays that `make` cannot have made. It sees what is stored on
        every load, and what is made before it is written.

    Raises:
      OSError: the directory cannot be read or written; the message names it and the setting to change.
      ValueError: from `make`, whose OSError becomes a ValueError too; or the file is whole but holds other data. It is
        left as it is.
    """
    path = directory / _FILE
    try:
        if (arrays := _load(path, check)) is not None:
            return arrays
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory) as alone:
            if (arrays := _load(path, check)) is not None:
                return arrays
            if path.exists():
                print(f"{path} is damaged: generating it again", file=sys.stderr)
            if alone:
                for left_behind in directory.glob(f"{_TEMPORARY}*"):
                    left_behind.unlink(missing_ok=True)
            made = _made(make)
            check(made)
            _save(path, made)
            return _map(path)
    except OSError as error:
        reason = error.strerror or str(error)
        hint = "set config.task.data_dir or $EFFICIENT_TX_DATA to a directory that can be written and has room"
        raise OSError(
            error.errno or errno.EIO, f"no data at {path} and none can be stored there ({reason}): {hint}"
        ) from None


def _made(make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    try:
        return make()
    except OSError as error:
        raise ValueError(str(error)) from error


def _load(path: pathlib.Path, check: Callable[[Arrays], None]) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None if it is missing or damaged. Raises ValueError if it is whole but holds other data."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                return None
        arrays = _map(path)
    except _Foreign as error:
        _refuse(path, error)
    except OSError as error:
        if error.errno in (None, errno.ENOENT, errno.EINVAL):
            return None
        raise
    except Exception:  # a flipped bit makes the readers of zip and npy raise almost any error
        return None
    try:
        check(arrays)
    except ValueError as error:
        _refuse(path, error)
    return arrays


def _refuse(path: pathlib.Path, fault: Exception) -> NoReturn:
    raise ValueError(
        f"{path} is whole, but not what is kept there ({fault}): move it away, and it is made anew"
    ) from None


class _Foreign(Exception):
    """A file is no damaged one of `_save`, but another program's."""


def _map(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed npz file, memory-mapped; np.load does this for single npy files only."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        arrays = {}
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED:
                raise _Foreign(f"{name} is compressed")
            if member.compress_size != member.file_size:
                raise zipfile.BadZipFile(f"{name} has two sizes")
            file.seek(member.header_offset + 26)  # a file's header in a zip: 30 bytes, its name, extra fields
            skipped = sum(np.frombuffer(file.read(4), "<u2").tolist())
            start = file.seek(skipped, os.SEEK_CUR)
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(file)
            if dtype.hasobject:  # their bytes would be taken for addresses
                raise _Foreign(f"{name} holds Python objects")
            if file.tell() - start + math.prod(shape) * dtype.itemsize != member.file_size:
                raise _Foreign(f"{name} has more or fewer values than its shape {list(shape)}")
            mapped = np.memmap(file, dtype, "r", file.tell(), shape, "F" if by_column else "C")
            arrays[name] = mapped.view(np.ndarray)
        return arrays


def _save(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_name(_TEMPORARY + uuid.uuid4().hex)
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[bool]:
    """Waits for the directory's lock and holds it; the kernel frees it however the holder ends.

    Yields False on a file system without locks: there concurrent runs all make the data, and those of the last one
    stay.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that generates {directory}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            yield False
            return
        yield True
    finally:
        os.close(handle)
