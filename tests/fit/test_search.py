"""The search for the largest batch, beside functions whose answer is known."""

import math

import pytest

from efficient_tx.fit.search import MOST, largest

pytestmark = pytest.mark.quick


def asked(memory, limit, start=4):
    calls = []
    found = largest(lambda number: (calls.append(number), memory(number))[1], limit, start)
    return found, calls


@pytest.mark.parametrize("start", [1, 4, 64])
@pytest.mark.parametrize("limit", [110, 199, 500, 1099])
def test_a_line_takes_two_numbers_and_its_crossing(limit, start):
    """Below 100 exact: the number found fits, the next one does not, and both were asked for."""
    found, calls = asked(lambda number: 100 + 10 * number, limit, start)
    assert found == (limit - 100) // 10
    assert {found, found + 1} - {0} <= set(calls) and len(calls) <= 6


def test_a_large_number_is_found_up_to_a_hundredth():
    found, calls = asked(lambda number: 7 * number, 7 * 54_321)
    assert 54_321 * 0.99 <= found <= 54_321 and len(calls) <= 4


@pytest.mark.parametrize(
    "memory",
    [
        lambda number: number * number,
        lambda number: math.inf if number > 37 else 100.0,
        lambda number: math.inf if number > 37 else number,
        lambda number: 0 if number <= 37 else 10**9,
    ],
)
def test_what_is_no_line_is_found_by_halves(memory):
    largest_fitting = max(number for number in range(100) if memory(number) <= 1369)
    found, calls = asked(memory, 1369)
    assert found == 37 == largest_fitting and len(calls) < 30


def test_the_ends():
    assert asked(lambda number: math.inf, 1)[0] == 0
    assert asked(lambda number: 1, 1)[0] == MOST


def test_a_compiler_that_computes_anew_near_its_limit_is_not_asked_for_the_largest_of_all():
    """Memory stays just below the limit from 1,200 to 1,400, and nothing larger fits."""
    asked = []

    def memory(number):
        asked.append(number)
        return number * 10.0 if number < 1200 else 12_000.0 - number / 1000 if number <= 1400 else float("inf")

    found = largest(memory, 12_100, 32)
    assert 1386 <= found <= 1400 and max(asked) <= 1.1 * 1400 and len(asked) <= 12
