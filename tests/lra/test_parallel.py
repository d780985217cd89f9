"""Data made in parallel processes: the chunks of one process, in order; a worker that fails is reported."""

import numpy as np
import pytest

from lra import parallel


def test_the_number_of_workers_changes_nothing():
    settings = {"min_len": 20, "max_len": 4000, "seed": 4}
    alone, *others = (
        [chunk for chunk, _ in zip(parallel.chunks("lra.listops:sample", settings, workers), range(6))]
        for workers in (1, 2, 3)
    )
    for other in others:
        for one, two in zip(alone, other, strict=True):
            assert one["draws"] == two["draws"]
            for name in ("lengths", "labels", "tokens"):
                np.testing.assert_array_equal(one[name], two[name])
    assert not np.array_equal(alone[0]["tokens"][:100], alone[1]["tokens"][:100])


def fails_at_three(index):
    if index == 3:
        raise ArithmeticError("three")
    return index


def test_a_worker_that_fails_is_reported(capfd):
    found = []
    with pytest.raises(ChildProcessError, match=r"tests.lra.test_parallel:fails_at_three ended with exit code 1"):
        for result in parallel.chunks("tests.lra.test_parallel:fails_at_three", {}, 2):
            found.append(result)
    assert found == [0, 1, 2]
    assert "ArithmeticError: three" in capfd.readouterr().err
