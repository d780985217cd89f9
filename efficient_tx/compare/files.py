"""Files that are whole or not there."""

import os
from pathlib import Path


def write(path: Path, contents: bytes | str) -> None:
    """Writes a file beside `path` and renames it: whoever looks, and whenever this is killed, sees all or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    os.replace(part, path)
