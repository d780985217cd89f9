"""The static options of an implementation of linear_scan."""

from typing import NamedTuple


class Options(NamedTuple):
    """Static and hashable; see `linear_scan`."""

    reverse: bool
