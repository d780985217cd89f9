"""Names that a person typed: whether a thing is called so, and which one was meant."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def nearest(name: str, choices: Iterable[str]) -> str:
    """The choice that is most like `name`."""
    return difflib.get_close_matches(str(name), list(choices), 1, 0.0)[0]


def check_name(name: str, choices: Collection[str], where: str) -> None:
    """Raises ValueError unless `name`, which stands at `where`, is one of `choices`; the line has the nearest one."""
    if name not in choices:
        near = nearest(name, choices)
        raise ValueError(f"{where} is {name!r}: choose one of {', '.join(choices)} (nearest: {near!r})")


def lookup(table: Mapping[str, T], name: str, where: str) -> T:
    """table[name]; ValueError as `check_name`."""
    check_name(name, table, where)
    return table[name]
