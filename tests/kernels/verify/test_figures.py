"""Figures of programs: what is stored, and what counts as growth."""

import json

import pytest

from efficient_tx.kernels.verify import figures
from efficient_tx.kernels.verify.program import Kernel, Program

pytestmark = pytest.mark.quick


def program(temporaries=0, **kernel):
    return figures.of_program(Program("a1b2", 1.234, 10, 20, temporaries, 0, (Kernel("k", **kernel),), "text"))


def test_a_tenth_is_no_growth_and_more_is():
    before = program(temporaries=100, instructions=1000, spills=0)
    assert figures.grown(before, program(temporaries=110, instructions=1100, spills=0)) == []
    assert figures.grown(before, program(temporaries=111, instructions=1101, spills=1)) == [
        "temporaries grew from 100 to 111", "instructions of k grew from 1000 to 1101", "spills of k grew from 0 to 1",
    ]  # fmt: skip


def test_a_figure_or_kernel_that_was_not_there_has_not_grown():
    assert figures.grown(program(instructions=5), program(registers=200)) == []


def test_of_several_kernels_of_one_name_the_largest_counts():
    def of(*instructions):
        kernels = tuple(Kernel("k", instructions=n) for n in instructions)
        return figures.of_program(Program("a1b2", 1.0, 1, 1, 0, 0, kernels, ""))

    assert figures.grown(of(300, 500), of(500, 300)) == [] == figures.grown(of(300, 500), of(450, 520))
    assert figures.grown(of(300, 500), of(300, 600)) == ["instructions of k grew from 500 to 600"]


def test_programs_are_stored_beside_known_ones(tmp_path):
    path = tmp_path / "kernels.json"
    figures.store(path, {"a v5e": program(registers=3), "gone v5e": program()}, ["a v5e", "gone v5e"])
    figures.store(path, {"b h100": program()}, ["a v5e", "b h100"])
    assert figures.read(path) == {"a v5e": program(registers=3), "b h100": program()}
    assert program(registers=3)["kernels"] == [{"name": "k", "registers": 3}]
    assert {"date", "versions"} < json.loads(path.read_text()).keys()
    assert figures.read(tmp_path / "none.json") == {}


def test_figures_of_other_compilers_are_not_compared(tmp_path, monkeypatch):
    path, known = tmp_path / "kernels.json", ["a v5e", "a h100", "b h100"]
    figures.store(path, {"a v5e": program(), "a h100": program()}, known)
    stored = json.loads(path.read_text())
    assert figures.comparable(stored, "cuda") and figures.comparable(stored, "tpu")
    monkeypatch.setattr(figures, "ptxas_version", lambda: "99.9")
    assert not figures.comparable(stored, "cuda") and figures.comparable(stored, "tpu")
    assert figures.read(path) == {"a v5e": program()}
    figures.store(path, {"b h100": program()}, known)
    assert figures.read(path) == {"a v5e": program(), "b h100": program()}


def test_a_program_is_what_its_figures_say():
    before = Program("a1b2", 1.25, 10, 20, 5, 1, (Kernel("k", on_chip=7, registers=3), Kernel("other")), "")
    assert figures.to_program(json.loads(json.dumps(figures.of_program(before)))) == before
