"""Files: atomic writes, so that a file is complete or absent; and which files of a folder are data."""

import contextlib
import os
from pathlib import Path


def write(path: Path, content: bytes | str) -> None:
    """Writes a file atomically: if the process is killed at any moment, the file is the old one or the new one.

    Raises:
      OSError: the file cannot be written. The old file is unchanged, and no temporary file is left.
    """
    part = path.with_name(f"{path.name}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def visible(folder: Path, pattern: str) -> list[Path]:
    """The paths in `folder` that match a glob pattern, sorted, without hidden ones.

    A name that begins with a dot is no data: macOS leaves a `._name` beside every file that it copies.
    """
    found = sorted(folder.glob(pattern))
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
