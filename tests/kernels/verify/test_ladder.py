"""What is compiled anew, and what is known of it already."""

import types

import pytest

from efficient_tx.kernels.verify import figures, ladder
from efficient_tx.kernels.verify.program import Program
from efficient_tx.kernels.verify.targets import TARGETS

pytestmark = pytest.mark.quick


def test_a_program_of_the_same_source_is_not_compiled_again(monkeypatch):
    """Source and digest are one letter here."""
    compiled = []

    def program(source, target):
        compiled.append(source)
        return Program(source, 1.0, 1, 1, 0, 0, (), "")

    monkeypatch.setattr(ladder, "digest", lambda source: source)
    monkeypatch.setattr(ladder, "compile_program", program)
    monkeypatch.setattr(ladder, "faults", lambda compilation, program: [program.source])
    planned = [
        types.SimpleNamespace(name=name, operation="o", target=TARGETS["v5e"], lowered=lambda name=name: name)
        for name in "abc"
    ]
    stored = {name: figures.of_program(Program(name, 1.0, 1, 1, 0, 0, (), "")) for name in "ac"}
    stored["c"]["source"] = "older"
    rows = list(ladder.compilations(planned, stored, str))
    assert compiled == ["b", "c"]
    assert [(row["name"], row["faults"], row["figures"]["source"]) for row in rows] == [(x, [x], x) for x in "abc"]
