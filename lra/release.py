"""Folders of an unpacked lra_release, the archive of Long Range Arena, which holds some of them once and some twice."""

import pathlib
from collections.abc import Callable, Sequence

from efficient_tx.files import local_path


def find(
    source: str, folders: Sequence[str], complete: Callable[[pathlib.Path], bool], *, holds: str, missing: str
) -> pathlib.Path:
    """The first of `folders` in the directory `source` that is `complete`.

    Args:
      holds: what the directory should hold, for the error.
      missing: what none of the folders has, for the error.

    Raises:
      FileNotFoundError: there is no such directory, or none of the folders is complete.
    """
    root = local_path(source)
    if not root.is_dir():
        raise FileNotFoundError(
            f'task.source={source!r}: neither "generated" nor a directory; pass the path of an unpacked lra_release, '
            f"which holds {holds}"
        )
    places = [root / folder for folder in folders]
    for place in places:
        if complete(place):
            return place
    raise FileNotFoundError(f"task.source={source!r}: {missing} in none of {', '.join(map(str, places))}")
