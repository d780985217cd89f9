"""What is compiled anew, and what is known of it already."""

import types

import numpy as np
import pytest

from efficient_tx.kernels.verify import figures, ladder
from efficient_tx.kernels.verify.program import Program
from efficient_tx.kernels.verify.targets import TARGETS

pytestmark = pytest.mark.quick


def test_a_program_of_the_same_source_is_not_compiled_again(monkeypatch):
    """Source and digest are one letter here; d was compiled quickly, and takes too much memory so."""
    compiled = []

    def run(source):
        compiled.append(source)
        return Program(source, 1.0, 1, 1, 0, 0, (), "")

    monkeypatch.setattr(ladder, "digest", lambda source: source)
    monkeypatch.setattr(ladder, "judged_anew", lambda compilation, program: program.source == "d")
    monkeypatch.setattr(ladder, "faults", lambda compilation, program: [program.source])
    planned = [
        types.SimpleNamespace(name=name, operation="o", target=TARGETS["v5e"], lowered=lambda name=name: name, run=run)
        for name in "abcd"
    ]
    stored = {name: figures.of_program(Program(name, 1.0, 1, 1, 0, 0, (), "")) for name in "acd"}
    stored["c"]["source"] = "older"
    rows = list(ladder.compilations(planned, stored, str))
    assert compiled == ["b", "c", "d"]
    assert [(row["name"], row["faults"], row["figures"]["source"]) for row in rows] == [(x, [x], x) for x in "abcd"]


def test_bytes_are_counted_of_lists_that_are_drawn(monkeypatch):
    """Of lists of zeros, all queries would stand in one row. Values do not matter and are zeros."""
    seen = []
    one = {"length": 1024, "sequences": 2, "dim": 64, "sizes": "128/128", "samples": 64, "pieces": 1}
    monkeypatch.setattr(ladder, "production", lambda operation: [one])
    monkeypatch.setattr(ladder, "traffic", lambda call, arrays, cotangents, of: seen.append(arrays) or [])
    assert not list(ladder.accounts(["sampled_block_attention"], ["pallas_tpu"], str))
    ((q, k, v, *lists),) = seen
    assert not any(x.any() for x in (q, k, v))
    assert len(lists) == 4 and all(len(np.unique(x)) > 30 for x in lists)
