"""Whole training steps and mixers compiled for chips that are not there (`pytest -m aot`); all by `verify --all`."""

import pytest

from efficient_tx.kernels.verify import mixers, steps
from efficient_tx.kernels.verify.targets import TARGETS
from efficient_tx.kernels.verify.training import RECIPES

pytestmark = pytest.mark.aot


@pytest.mark.parametrize(("name", "target"), [("Skyformer, ListOps", "h100")])
def test_a_step_sums_gradients_writes_over_its_state_and_needs_no_host(name, target):
    step = steps.compiled_step(RECIPES[name](), TARGETS[target])
    assert steps.faults(step) == []
    assert step.collectives == {"all-reduce": 1} and step.loops == []
    assert step.kernels["flash_attention"] == step.kernels["flash_attention_keys"] == 4


# Without a kernel; with sorting; with a Fourier transform; with eigenvalues.
@pytest.mark.parametrize(
    ("name", "target"), [("tensor", "h100"), ("hyper", "h100"), ("fourier", "h100"), ("lev", "v5e")]
)
def test_a_mixer_has_no_loop_over_heads_examples_or_tokens(name, target):
    assert mixers.serial_loops(mixers.program_of(name, TARGETS[target])) == []
