"""The runner: which cores its runs get."""

import os

import pytest

from efficient_tx.sweep.runner import shares

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("cores", "jobs", "expected"),
    [
        ({0, 1, 2, 3}, 1, [{0, 1, 2, 3}]),
        ({0, 1, 4, 5}, 2, [{0, 4}, {1, 5}]),
        ({0, 1, 2}, 2, [{0, 1, 2}] * 2),  # no equal shares
        ({3}, 2, [{3}] * 2),
    ],
)
def test_runs_at_once_have_equal_shares_or_all_cores(cores, jobs, expected, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores, raising=False)
    assert shares(jobs) == expected


def test_a_system_that_cannot_tell_shares_nothing(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert shares(2) == [set(), set()]
