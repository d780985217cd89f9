"""A selection of combinations in which every pair, or triple, of values occurs that occurs in any of them."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np


def cover(rows: Sequence[Mapping[str, int | str]], strength: int) -> list[int]:
    """Numbers of selected rows, which have the same keys, with every `strength` values that are in a row together.

    Each next row is the first of those that have the most of them that none before has.
    """
    names = list(rows[0]) if rows else []
    groups = list(itertools.combinations(names, min(strength, len(names))))
    numbers: dict[tuple, int] = {}
    of_row = np.array([
        [numbers.setdefault((group, *(row[name] for name in group)), len(numbers)) for group in groups] for row in rows
    ])  # fmt: skip
    missing, chosen = np.ones(len(numbers), bool), []
    while missing.any():
        chosen.append(int(missing[of_row].sum(1).argmax()))
        missing[of_row[chosen[-1]]] = False
    return chosen
