"""What is read from the program of a training step, and what is a fault of one."""

import dataclasses

import pytest

from efficient_tx.kernels.verify import mixers, steps
from efficient_tx.kernels.verify.loops import Loop

pytestmark = pytest.mark.quick

STEP = steps.Step(
    seconds=1.0, collectives={"all-reduce": 2}, among=("{{0,1,2,3}}",), reduced=103, parameters=100, sums=4, state=9,
    written_over=9, host=(), kernels={"flash_attention": 1}, loops=[], temporaries=1, arguments=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"collectives": {"all-reduce": 1, "all-gather": 1}}, "collectives that do not sum: all-gather"),
        ({"among": ("{{0,1,2,3}}", "{{0,1},{2,3}}")}, "sums among 2 groups"),
        ({"reduced": 99}, "99 numbers are summed: 100 parameters"),
        ({"reduced": 200}, "200 numbers are summed: 100 parameters"),
        ({"written_over": 8}, "8 of 9 arrays of the state are written over"),
        ({"host": ("outfeed",)}, "the host takes part: outfeed"),
        ({"kernels": {"Cholesky": 2}}, "no kernel"),
    ],
)
def test_a_step_only_sums_writes_over_its_state_and_has_kernels(change, words):
    found = steps.faults(dataclasses.replace(STEP, **change))
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


def test_collectives_transfers_and_aliases_are_read_from_the_text():
    text = """\
HloModule f, input_output_alias={ {0}: (0, {}, may-alias), {1}: (3, {}, must-alias) }, entry_computation_layout={}
  %all-reduce.4 = (f32[2048,64]{0,1:T(8,128)}, f32[]{:T(128)}) all-reduce(%a), replica_groups={{0,1,2,3}}
  %g = f32[8]{0} all-gather-start(%c), replica_groups=[1,4]<=[4], dimensions={0}
  %done = f32[8]{0} all-gather-done(%g)
  %o = token[] outfeed(%x, %t)
"""
    found = steps.OPERATION.findall(text)
    assert [kind for _, kind, _ in found] == ["all-reduce", "all-gather", "outfeed"]
    assert steps.numbers(found[0][0]) == 2048 * 64 + 1
    assert [steps.groups(rest) for *_, rest in found[:2]] == ["{{0,1,2,3}}", "[1,4]<=[4]"]
    assert steps.aliases(text) == 2
    assert steps.aliases("HloModule f\n") == 0


@pytest.mark.parametrize(
    ("trips", "over"),
    [
        (mixers.TOKENS, "tokens"), (mixers.TOKENS - 1, "tokens"), (mixers.EXAMPLES, "examples"),
        (mixers.EXAMPLES * mixers.HEADS, "examples"), (mixers.HEADS, "heads"), (32, None), (None, None),
    ],
)  # fmt: skip
def test_a_loop_over_what_could_be_side_by_side_is_serial(trips, over):
    assert mixers.serial(Loop(trips, "while")) == over
