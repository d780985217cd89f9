"""How often the loops of a program turn, as the compilers for GPUs and TPUs write it."""

import pytest

from efficient_tx.kernels.verify.loops import Loop, loops

GPU = """\
%body.1 (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %done = (s32[], f32[8]) tuple(%i, %y)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %while.1 = (s32[], f32[8]) while(%t), condition=%c.1, body=%body.1, \
metadata={op_name="jit(f)/while"}, backend_config={"known_trip_count":{"n":"64"},"dynamic_variables":[]}
}
"""
TPU = """\
%wide.c.1 (a: (s32[], f32[8], s32[])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(32)
  %a = (s32[]{:T(128)}, f32[8]{0:T(256)}, s32[]{:T(128)}) parameter(0)
  %g = s32[]{:T(128)} get-tuple-element(%a), index=0
  ROOT %lt.0 = pred[]{:T(512)} compare(%g, %constant.3), direction=LT, metadata={op_name="jit(f)/while/cond/lt"}
}

%c.2 (a: (s32[], f32[])) -> pred[] {
  %constant.4 = f32[]{:T(128)} constant(0)
  %a.1 = (s32[]{:T(128)}, f32[]{:T(128)}) parameter(0)
  %g.1 = f32[]{:T(128)} get-tuple-element(%a.1), index=1
  ROOT %gt.0 = pred[]{:T(512)} compare(%g.1, %constant.4), direction=GT
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %while.4 = (s32[]{:T(128)}, f32[8]{0}, s32[]) while(%t), condition=%wide.c.1, body=%b, metadata={op_name="jit(f)/map"}
  ROOT %while.5 = (s32[]{:T(128)}, f32[]) while(%u), condition=%c.2, body=%b.2
}
"""


@pytest.mark.quick
def test_turns_are_what_a_compiler_says_or_a_condition_compares_with():
    assert loops(GPU) == [Loop(64, "jit(f)/while")]
    assert loops(TPU) == [Loop(32, "jit(f)/map"), Loop(None, "")]
    assert loops("") == []
