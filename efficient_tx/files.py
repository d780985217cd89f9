"""Files that are whole or not there."""

import contextlib
import os
from pathlib import Path


def write(path: Path, content: bytes | str) -> None:
    """Writes a file that is, at any moment and whatever kills the process, either the old one or the new one.

    Raises:
      OSError: it cannot be written; the old one is as it was, and nothing lies beside it.
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
