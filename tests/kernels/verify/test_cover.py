"""The selection of combinations: it has every pair, and is small."""

import itertools

import pytest

from efficient_tx.kernels.verify.cover import pairwise

pytestmark = pytest.mark.quick


def pairs(rows):
    return {pair for row in rows for pair in itertools.combinations(row.items(), 2)}


def test_every_pair_occurs_in_few_rows():
    rows = [dict(zip("abcd", values)) for values in itertools.product(range(4), "xyz", range(3), range(2))]
    chosen = pairwise(rows)
    assert pairs(rows[number] for number in chosen) == pairs(rows)
    # 4 · 3 values of the two longest axes need 12 rows at least; there are 72 in all.
    assert 12 <= len(chosen) <= 16


def test_pairs_that_no_row_has_are_not_missed():
    rows = [{"a": a, "b": b} for a, b in itertools.product(range(3), range(3)) if a <= b]
    assert sorted(pairwise(rows)) == list(range(6))
    assert pairwise([]) == []
