"""The selection of combinations: it has every pair or triple, and is small."""

import itertools

import pytest

from efficient_tx.kernels.verify.cover import cover

pytestmark = pytest.mark.quick


def together(rows, strength):
    return {some for row in rows for some in itertools.combinations(row.items(), strength)}


@pytest.mark.parametrize(("strength", "least", "most"), [(2, 12, 16), (3, 36, 44)])
def test_every_pair_or_triple_occurs_in_few_rows(strength, least, most):
    rows = [dict(zip("abcd", values)) for values in itertools.product(range(4), "xyz", range(3), range(2))]
    chosen = cover(rows, strength)
    assert together((rows[number] for number in chosen), strength) == together(rows, strength)
    # The values of the longest axes need 4 · 3 rows, or 4 · 3 · 3, at least; there are 72 in all.
    assert least <= len(chosen) <= most


def test_pairs_that_no_row_has_are_not_missed():
    rows = [{"a": a, "b": b} for a, b in itertools.product(range(3), range(3)) if a <= b]
    assert sorted(cover(rows, 2)) == list(range(6))
    assert cover([], 2) == []
