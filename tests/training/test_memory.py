"""Memory: a run that no machine holds is refused before it begins, by a bound that no program undercuts."""

import dataclasses

import jax
import pytest
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.training import memory
from tests.support.toy import TASK, Model

pytestmark = pytest.mark.quick

SIZES = {"features": 8, "batch_size": 64, "grad_accum": 2}


def test_there_is_memory_and_the_devices_of_a_machine_share_it():
    assert 2**28 < memory.available() < 2**50
    meminfo = open("/proc/meminfo").read().split()  # noqa: SIM115
    total = 1024 * int(meminfo[meminfo.index("MemTotal:") + 1])
    assert memory.available() * jax.local_device_count() == pytest.approx(total, rel=0.01)


def test_the_bound_is_the_sum_of_what_must_be_there(monkeypatch):
    """On four devices 16 rows each: inputs of 4 bytes and activations of 2 bytes, in two micro-batches."""
    model = Model(nnx.Rngs(0))
    parameters = 8 * (5 * 8 + 8 * 2 + 2)
    batch = 16 * 6 * 4 + 16 * 6 * 8 * 2 // 2
    for there, refused in ((parameters - 1, "model.features"), (parameters + batch - 1, "batch_size")):
        monkeypatch.setattr(memory, "available", lambda there=there: there)
        with pytest.raises(OptionError, match=r"0\.0 GiB.*, and there are 0\.0 GiB: use a smaller") as caught:
            memory.check_memory(model, TASK, **SIZES)
        assert (caught.value.option, caught.value.value) == (refused, SIZES[refused.split(".")[-1]])
    monkeypatch.setattr(memory, "available", lambda: parameters + batch)
    memory.check_memory(model, TASK, **SIZES)
    images = dataclasses.replace(TASK, kind="image", image_shape=(2, 2, 3))
    monkeypatch.setattr(memory, "available", lambda: parameters + 16 * 12 * 4)
    memory.check_memory(model, images, **SIZES)
    monkeypatch.setattr(memory, "available", lambda: None)
    memory.check_memory(model, TASK, **SIZES | {"batch_size": 2**60})
