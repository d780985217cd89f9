"""Paths that people type, what of a folder is data, and atomic writes: a file is complete or absent."""

import contextlib
import os
import re
import secrets
from pathlib import Path


def local_path(path: str | os.PathLike) -> Path:
    """The path itself if it exists, else with a leading `~` expanded. Other characters have no special meaning.

    Raises:
      ValueError: an address ("gs://bucket/run"), the home of an unknown user, or a name that cannot be printed in a
        line. The message begins with the path.
    """
    text = os.fspath(path)
    if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text):
        raise ValueError(f"{text!r} has control characters, or is not UTF-8: use another name")
    if os.path.exists(text):
        return Path(text)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise ValueError(f"{text} is an address, not a path of this machine: mount it, and give the path there")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text} cannot be found: there is no such user") from None


def write(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: if the process is killed at any moment, the file is the old one or the new one.

    Several processes may write the same file: the last one wins. A killed process leaves a hidden temporary file.

    Raises:
      OSError: the file cannot be written. The old file is unchanged, and no temporary file is left.
    """
    part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(part, "xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def visible(folder: Path, pattern: str) -> list[Path]:
    """The paths in `folder` that match a glob pattern, sorted, without hidden ones.

    A name that begins with a dot is no data: macOS leaves a `._name` beside every file that it copies.
    """
    found = sorted(folder.glob(pattern))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def clear(folder: Path, *names: str) -> None:
    """Removes the temporary files that killed processes left of `write`. Nobody may be writing these files."""
    for entry in folder.iterdir():
        left = re.fullmatch(r"\.(.+)\.[0-9a-f]{16}\.tmp", entry.name)
        if left and left[1] in names:
            entry.unlink(missing_ok=True)
