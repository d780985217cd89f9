"""The loops of a compiled program outside of its kernels, and how often they turn."""

import re
from typing import NamedTuple

LOOP = re.compile(r"^\s*(?:ROOT )?%?\S+ = .* while\(.*condition=%?([^\s,]+)(.*)$", re.MULTILINE)
COMPUTATION = re.compile(r"^%?(\S+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)


class Loop(NamedTuple):
    """Attributes:
    trips: how often it turns; None where that depends on data.
    name: jax's name of the operation that it is of.
    """

    trips: int | None
    name: str


def loops(text: str) -> list[Loop]:
    """Those of the text of a compiled program.

    XLA for GPUs says how often a loop turns. For TPUs the bound that its condition compares the counter with is taken:
    the counters of jax's loops begin at 0.
    """
    conditions = None
    found = []
    for condition, rest in LOOP.findall(text):
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest)
        if not known:
            conditions = conditions or dict(COMPUTATION.findall(text))
            known = bound(conditions[condition])
        name = re.search(r'op_name="([^"]*)"', rest)
        found.append(Loop(int(known[1]) if known else None, name[1] if name else ""))
    return found


def bound(condition: str) -> re.Match | None:
    """The number that a condition's counter stays below, as group 1."""
    last = re.search(r"ROOT .* compare\([^%)]*%?([^\s,]+), [^%)]*%?([^\s,)]+)\), direction=LT", condition)
    return last and re.search(rf"^\s*%?{re.escape(last[2])} = s32\[\]\S* constant\((\d+)\)", condition, re.MULTILINE)
