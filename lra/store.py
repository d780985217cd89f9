"""Arrays that are made on first use and stored once, safe against kills and concurrent runs."""

import contextlib
import errno
import fcntl
import os
import pathlib
import sys
import uuid
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

_FILE = "data.npz"
_TEMPORARY = ".writing-"


def stored(directory: pathlib.Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in `directory`/data.npz; they are made and written there if they are missing or damaged.

    They are read-only and memory-mapped: gigabytes open in seconds, and only parts that are used take memory. The file
    appears complete or not at all, and its checksums are verified on every load. One process makes the data while
    others wait for it; files that a killed process left are removed.

    Raises:
      OSError: the directory cannot be read or written; the message names it and the setting to change.
      ValueError: from `make`; its OSError becomes a ValueError too.
    """
    path = directory / _FILE
    try:
        if (arrays := _load(path)) is not None:
            return arrays
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory) as alone:
            if (arrays := _load(path)) is not None:
                return arrays
            if path.exists():
                print(f"{path} is damaged: generating it again", file=sys.stderr)
            if alone:
                for left_behind in directory.glob(f"{_TEMPORARY}*"):
                    left_behind.unlink(missing_ok=True)
            _save(path, _made(make))
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


def _load(path: pathlib.Path) -> dict[str, np.ndarray] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        return None if damaged else _map(path)
    except OSError as error:
        if error.errno in (None, errno.ENOENT, errno.EINVAL):
            return None
        raise
    except Exception:  # a flipped bit makes the readers of zip and npy raise almost any error
        return None


def _map(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an uncompressed npz file, memory-mapped; np.load does this for single npy files only."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        arrays = {}
        for member in archive.infolist():
            file.seek(member.header_offset + 26)  # a file's header in a zip: 30 bytes, its name, extra fields
            name, extra = np.frombuffer(file.read(4), "<u2").tolist()
            file.seek(name + extra, os.SEEK_CUR)
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(file)
            mapped = np.memmap(file, dtype, "r", file.tell(), shape, "F" if by_column else "C")
            arrays[member.filename.removesuffix(".npy")] = mapped.view(np.ndarray)
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
