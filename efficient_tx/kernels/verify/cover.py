"""A selection of combinations in which every pair of values occurs that occurs in any of them."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np


def pairwise(rows: Sequence[Mapping[str, int | str]]) -> list[int]:
    """Numbers of the selected rows, which have the same keys; each next one has the most pairs that none has yet."""
    names = list(rows[0]) if rows else []
    numbers: dict[tuple, int] = {}
    pairs = np.array([
        [numbers.setdefault((a, row[a], b, row[b]), len(numbers)) for a, b in itertools.combinations(names, 2)]
        for row in rows
    ])  # fmt: skip
    missing, chosen = np.ones(len(numbers), bool), []
    while missing.any():
        chosen.append(int(missing[pairs].sum(1).argmax()))
        missing[pairs[chosen[-1]]] = False
    return chosen
