"""What it costs that a kernel is derived from a score: each beside a twin written by hand, of the same tiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_tx.kernels.flash_attention import flash_attention
from efficient_tx.kernels.verify import price, twins
from efficient_tx.kernels.verify.plan import GATES
from efficient_tx.kernels.verify.program import Kernel
from efficient_tx.kernels.verify.targets import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("score", twins.SCORES)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_twins_are_right(score, platform):
    r = np.random.default_rng(0)
    arrays = [r.normal(size=(1, 256, 2, 16)) for _ in range(4)]
    sizes = twins.sizes_of(platform, jax.ShapeDtypeStruct((1, 128, 2, 16), jnp.float32))
    with jax.enable_x64(True):
        out, pull = jax.vjp(lambda *qkv: flash_attention(*qkv, score=score, implementation="reference"), *arrays[:3])
        expected = out, *pull(arrays[3])
    found = twins.gradient(score, platform, sizes, *(x.astype(np.float32) for x in arrays), interpret=True)
    for ours, theirs in zip(found, expected):
        # float32 over 256 keys
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.quick
def test_what_is_more_than_a_tenth_above_the_twin_is_a_fault():
    def pair(**ours):
        figures = {"instructions": 100, "registers": 50, "spills": 0}
        return price.Pair("softmax", 64, "h100", Kernel("k", **figures | ours), Kernel("k", **figures))

    assert pair(instructions=110).faults() == []
    assert pair(spills=4, registers=60).faults() == [
        "k, softmax, 64 dims, h100: 60 registers, by hand 50",
        "k, softmax, 64 dims, h100: 4 spills, by hand 0",
    ]


@pytest.mark.aot
@pytest.mark.parametrize("target", GATES)
@pytest.mark.parametrize(("score", "dim"), [("softmax", 128), ("sigmoid", 64), ("gaussian", 128)])
def test_a_derived_kernel_is_within_a_tenth_of_its_twin(score, dim, target):
    found = list(price.pairs(score, dim, TARGETS[target]))
    assert len(found) == 3
    assert [fault for pair in found for fault in pair.faults()] == []
