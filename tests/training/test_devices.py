"""The cores of a CPU as devices: how many, what the user has said, and the patience of one with the other."""

import os
import subprocess
import sys

import pytest

from efficient_tx.training import devices

GIB = 2**30


@pytest.mark.quick
@pytest.mark.parametrize(
    ("cores", "examples", "parameters", "count"),
    [
        (1, 64, 10**5, 1),
        (2, 16, 10**5, 2),
        (8, 6, 10**5, 6),
        (8, 20, 10**5, 5),
        (8, 1, 10**5, 1),
        (6, 7, 10**5, 1),
        (8, 64, 10**8, 2),  # 1.5 GiB of state, and four for all copies
        (8, 64, 10**9, 1),
        (2, 0, 10**5, 1),
    ],
)
def test_cores_share_the_examples_evenly(cores, examples, parameters, count, monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: cores)
    monkeypatch.setattr(devices, "of_machine", lambda: 16 * GIB)
    assert devices.sharing(examples, parameters) == count


@pytest.mark.quick
def test_without_a_known_memory_there_is_one_device(monkeypatch):
    monkeypatch.setattr(devices, "of_machine", lambda: None)
    assert devices.sharing(64, 10) == 1


def ended(code, **environment):
    """A process of its own, whose jax has not started; three cores, whatever this machine has."""
    start = "from efficient_tx.training import devices\nimport jax\ndevices.cores = lambda: 3\n"
    kept = {name: text for name, text in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    return subprocess.run(
        [sys.executable, "-c", start + code], env=kept | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


DIVIDE = "devices.divide_cores(12, parameters=lambda: 100)\n"
COUNT = "print(jax.device_count())\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "environment", "count"),
    [
        (DIVIDE + COUNT, {}, "3"),
        (DIVIDE + COUNT, {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "2"),
        (DIVIDE + COUNT, {"JAX_NUM_CPU_DEVICES": "1"}, "1"),
        (COUNT + DIVIDE + COUNT, {}, "1\n1"),
    ],
)
def test_the_user_decides_and_what_has_started_stays(code, environment, count):
    done = ended(code, **environment)
    assert done.stdout.strip() == count, done.stderr


# The second device arrives where they meet many seconds after the first.
MEET = """
import jax.numpy as jnp
def meet(turns):
    x = jax.lax.fori_loop(0, turns, lambda i, x: jnp.tanh(x @ x), jnp.eye(256))
    return jax.lax.psum(x.sum(), "devices")
print(jax.pmap(meet, axis_name="devices")(jnp.array([1, 1, 100_000])))
"""


@pytest.mark.slow
def test_the_patience_of_devices_is_what_is_set_after_jax_is_imported():
    """With a second of it the process ends: so the flags are read, and a later jaxlib's change of them is seen here."""
    impatient = ended("devices.FOREVER = 1\n" + DIVIDE + MEET)
    assert impatient.returncode < 0 and "Termination timeout" in impatient.stderr
    assert devices.FOREVER > 10 * 24 * 3600
