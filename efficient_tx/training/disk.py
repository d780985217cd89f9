"""Disk: what a run writes and reads again. Errors are one line, and a file that changed meanwhile is noticed."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from efficient_tx.files import write
from efficient_tx.training.errors import Gone, RunError

# A file of every workdir: CRC-32 of its JSON files, by name; of two, the second is that of the file before.
CHECKSUMS = "crc32.json"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an operating-system error (full disk, read-only folder) into one line that names `path`.

    Raises:
      RunError: the block raised OSError.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Calls `files.write`; its OSError becomes a RunError."""
    with writing(path):
        write(path, content)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON.

    Raises:
      RunError: as `write_bytes`.
    """
    write_bytes(path, encode(value))


def write_checked(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file for `read_checked`: its CRC-32 is in CHECKSUMS beside it. One process at a time.

    The checksum is written first, beside that of the file that is there: a kill in between leaves an intact file.

    Raises:
      RunError: as `write_bytes`.
    """
    content, before = encode(value), []
    with contextlib.suppress(OSError, ValueError):
        read_checked(path)
        before = [zlib.crc32(path.read_bytes())]
    try:
        checksums = _checksums(path.parent) or {}
    except ValueError:
        checksums = {}
    write_json(path.parent / CHECKSUMS, checksums | {path.name: [zlib.crc32(content), *before]})
    write_bytes(path, content)


def read_checked(path: Path) -> dict[str, Any]:
    """The JSON object in the file. In the workdir of an older version, without CHECKSUMS, it is not checked.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, or CHECKSUMS is. The message continues a line that begins with the file's name.
    """
    content = path.read_bytes()
    checksums = _checksums(path.parent)
    if checksums is not None and zlib.crc32(content) not in checksums.get(path.name, []):
        raise ValueError(f"is damaged (its CRC-32 differs from that in {CHECKSUMS})")
    try:
        return decode(content)
    except ValueError as error:
        raise ValueError(f"is damaged ({error})") from None


def encode(value: Any) -> bytes:
    """Indented JSON."""
    return (json.dumps(value, indent=2) + "\n").encode()


def decode(content: bytes) -> dict[str, Any]:
    """The JSON object in a file; raises ValueError if there is none."""
    try:
        value = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no JSON object")
    return value


def _checksums(folder: Path) -> dict[str, list[int]] | None:
    """The content of CHECKSUMS, None if there is none; a ValueError if it is damaged."""
    try:
        checksums = decode((folder / CHECKSUMS).read_bytes())
        if not all(isinstance(values, list) for values in checksums.values()):
            raise ValueError("there is no list of checksums")
    except FileNotFoundError:
        return None
    except ValueError as error:
        beside = f"{CHECKSUMS} beside it is damaged ({error}); without that file it would be read unchecked"
        raise ValueError(f"cannot be checked: {beside}") from None
    return checksums


def still_there(descriptor: int, path: Path) -> None:
    """Asks whether `path` is the file or folder that is open as `descriptor`.

    An open file keeps its inode number, so that none that replaces it can have the same.

    Raises:
      Gone: it is not.
    """
    try:
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return
    except OSError:
        pass
    raise Gone(f"{path} was deleted or replaced during the run")
