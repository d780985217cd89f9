"""The sections of the page, of canned figures."""

import dataclasses

import pytest

from efficient_tx.kernels.verify import mixers, price, sections, steps
from efficient_tx.kernels.verify.loops import Loop
from efficient_tx.kernels.verify.program import Kernel, Program

pytestmark = pytest.mark.quick

KERNEL = Kernel("k", on_chip=2048, instructions=10, spills=0, matrix_share=0.5)
LOOP = '  %w = f32[] while(%t), condition=%c, body=%b, metadata={op_name="jit(f)/while"}, '
PROGRAM = Program(**{
    **{field.name: 0 for field in dataclasses.fields(Program)}, "arguments": 4, "outputs": 4, "temporaries": 12 << 20,
    "kernels": (KERNEL, Kernel("routine")), "text": LOOP + 'backend_config={"known_trip_count":{"n":"104"}}\n',
})  # fmt: skip


def cells(lines):
    return [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]


def test_a_serial_loop_is_a_fault_unless_the_class_says_why():
    rows = [{"name": name, "target": "v5e", "program": PROGRAM, "faults": mixers.faults(name, PROGRAM)}
            for name in ("lev", "tensor")]  # fmt: skip
    lev, tensor = cells(sections.of_mixers([*rows]))
    assert lev[2:4] == tensor[2:4] == ["k, routine", "104"]
    assert lev[-1] == "a loop over examples: 104 turns, jit(f)/while"
    assert tensor[-1].startswith("on TPUs XLA")


def test_what_does_not_compile_keeps_its_row():
    failed = {"name": "a", "target": "v5e", "faults": ["does not compile: no"]}
    for lines in (sections.of_mixers([failed]), sections.of_steps([failed])):
        (row,) = cells(lines)
        assert row[-1] == "does not compile: no"
    peer = {"target": "v5e", "dim": 64, "mask": "none", "name": "theirs", "failed": "E: no"}
    ours, theirs = cells(sections.of_peers([peer | {"name": "ours", "program": PROGRAM}, peer]))
    assert ours[3:] == ["ours", "12.0", "2 / –", "10 / –", "0 / –", "50% / –"]
    assert theirs[4] == "E: no"


def test_figures_stand_beside_those_of_the_twin_and_of_the_state():
    ((*_, figures, registers, spills, fault),) = cells(
        sections.of_price([price.Pair("softmax", 64, "v5e", KERNEL, dataclasses.replace(KERNEL, instructions=9))])
    )
    assert (figures, registers, spills) == ("10 / 9", "–", "0 / 0") and fault.endswith("10 instructions, by hand 9")
    step = steps.Step(
        seconds=1.0, collectives={"all-reduce": 2}, among=("{{0}}",), reduced=103, parameters=100, sums=4, state=9,
        written_over=8, host=(), kernels={"k": 2}, loops=[Loop(9, ""), Loop(9, ""), Loop(None, "")],
        temporaries=1 << 20, arguments=1,
    )  # fmt: skip
    (row,) = cells(sections.of_steps([{"name": "m", "target": "h100", "step": step, "faults": []}]))
    assert row[1:] == [
        "4 h100", "all-reduce × 2", "3 + 100", "8 of 9", "0", "k × 2", "9 × 2, by data", "1", "none",
    ]  # fmt: skip
