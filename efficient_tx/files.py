"""Atomic writes: a file is complete or absent."""

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
