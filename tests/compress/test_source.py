"""The examples of calibration: as many as asked for, each once."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from efficient_tx.compress.asked import Asked
from efficient_tx.compress.source import calibration
from tests.support import toy


@pytest.mark.quick
@pytest.mark.parametrize("bucket", [False, True])
@pytest.mark.parametrize(("number", "sizes"), [(5, [5]), (16, [16]), (30, [16, 14]), (100, [16, 16, 8])])
def test_calibration_takes_each_example_once(number, sizes, bucket):
    """Tokens and places make the examples of this split distinct; 100 is more than it has."""
    examples = [{"inputs": np.array([1 + i // 4, 1 + i % 4]), "label": 0} for i in range(40)]
    task = dataclasses.replace(toy.TASK, train=examples, vocab_size=16, bucket=bucket)
    draws = []
    for draw in (0, 0, 1):
        batches = calibration(task, Asked(Path("run"), Path("out"), calibration=number, draw=draw), 16)
        assert [len(batch["label"]) for batch in batches] == sizes
        assert all(len(array) == len(batch["label"]) for batch in batches for array in batch.values())
        seen = [tuple(row[:2].tolist()) for batch in batches for row in batch["inputs"]]
        assert len(set(seen)) == len(seen) and all(batch["weight"].all() for batch in batches)
        draws.append(seen)
    assert draws[0] == draws[1] != draws[2]
