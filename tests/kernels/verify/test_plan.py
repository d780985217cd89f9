"""What counts as a fault of a compiled program, of programs that are made up."""

import pytest

from efficient_tx.kernels.case import nbytes
from efficient_tx.kernels.verify import plan
from efficient_tx.kernels.verify.plan import PASSES, everything, faults
from efficient_tx.kernels.verify.program import Kernel, Program

pytestmark = pytest.mark.quick

KERNEL = Kernel("a", registers=255, spills=0, tf32=0)


def found(name, *, share, kernels=(KERNEL,)):
    """The faults of a program whose temporaries are such a share of its arrays, outputs and what is saved."""
    compilation = next(one for one in everything([name.split()[0]], [name.split()[-1]]) if one.name == name)
    case = compilation.case()
    arrays, outputs = nbytes(case.arrays), nbytes(case.outputs())
    if compilation.which == "gradient":
        arrays, outputs = arrays + outputs, arrays + outputs
    saved = case.saved_bytes() if compilation.which == "gradient" else 0
    temporaries = round(share * (arrays + outputs + saved))
    return faults(compilation, Program("", 1.0, arrays, outputs, temporaries, 0, tuple(kernels), ""))


@pytest.mark.parametrize("which", PASSES)
def test_a_fallback_may_hold_more_than_a_kernel(which):
    kernel, fallback = (
        f"flash_attention 1024 all 2 64 bfloat16 {s} none {which} a100" for s in ("softmax", "relative")
    )
    assert found(kernel, share=1.24) == found(fallback, share=1.99, kernels=()) == []
    for name, share, kernels in ((kernel, 1.26, (KERNEL,)), (fallback, 2.01, ())):
        (fault,) = found(name, share=share, kernels=kernels)
        assert f"{share} times arrays" in fault


def test_a_case_says_what_its_kernel_may_hold():
    wide, short = (f"sampled_block_attention 4096 2 {dim} 128/128 64 1 forward v5e" for dim in (128, 64))
    assert found(wide, share=1.99) == found(short, share=2.74) == []
    for name, share in ((wide, 2.01), (short, 2.76)):
        (fault,) = found(name, share=share)
        assert f"{share} times arrays" in fault


@pytest.mark.parametrize("target", ["v6e", "h100"])
def test_what_holds_too_much_for_a_tpu_is_compiled_again_as_a_user_compiles_it(target, monkeypatch):
    """Quickly compiled it has a hundred bytes of temporaries, else none; with one byte of arrays and one of outputs."""
    compiled = []

    def program(lowered, of, *, quickly=True):
        compiled.append(quickly)
        return Program(lowered, 1.0, 1, 1, 100 if quickly else 0, 0, (), "")

    monkeypatch.setattr(plan, "program", program)
    (one,) = (
        c for c in everything(["monarch"], [target]) if c.name == f"monarch 1024 1024x1024 4 float32 forward {target}"
    )
    assert one.run("lowered").temporaries == (0 if target == "v6e" else 100)
    assert compiled == ([True, False] if target == "v6e" else [True])
    monkeypatch.setattr(plan, "share_of_temporaries", lambda *_: 1.0)
    assert one.run("lowered").temporaries == 100


def test_a_kernel_is_there_where_there_is_one_and_only_there():
    kernel, fallback = (f"flash_attention 1024 all 2 64 float32 {s} none forward h100" for s in ("softmax", "relative"))
    assert found(kernel, share=0, kernels=()) == ["no kernel in the program"]
    assert found(fallback, share=0) == ["a kernel, which cases.py says is without pallas_gpu"]


def test_spills_are_faults_of_narrow_dtypes_and_tf32_of_float32():
    spilled, tf32 = Kernel("a", registers=255, spills=8, tf32=0), Kernel("a", registers=9, spills=0, tf32=4)
    narrow, wide = (f"monarch 1024 1024x1024 4 {dtype} forward a100" for dtype in ("bfloat16", "float32"))
    assert found(narrow, share=0, kernels=[spilled]) == ["a: 8 bytes of registers spilled"]
    assert found(wide, share=0, kernels=[tf32]) == ["a: 4 instructions of tf32 in float32"]
    assert found(narrow, share=0, kernels=[tf32]) == found(wide, share=0, kernels=[spilled]) == []
