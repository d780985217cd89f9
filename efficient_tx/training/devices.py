"""Devices: the cores of a CPU as devices of their own, each with its share of the examples.

XLA shares out one operation after another over its threads, which the small ones of a training step gain little from.
One program a core, each on its own examples, takes 0.6 to 0.9 of the time (docs/training.md).
"""

import importlib.metadata
import os
from collections.abc import Callable

import jax

from efficient_tx.training.memory import of_machine

# Bytes of a parameter in training: itself, its gradient and two moments, in float32. Every device has a copy.
STATE_BYTES = 16
# The copies of the state take at most one part of this many of the machine's memory.
MEMORY_SHARE = 4
# Devices wait for each other once a step. XLA ends the process where one is a minute ahead of another, as it may be on
# a busy machine or in steps of minutes; it ends it at once for a flag that it does not know, too.
PATIENCE = ("xla_cpu_collective_call_warn_stuck_timeout_seconds", "xla_cpu_collective_call_terminate_timeout_seconds")
PATIENT = ("0.10.", "0.11.", "0.12.")
FOREVER = 10**6


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def divide_cores(examples: int, *, parameters: Callable[[], int]) -> None:
    """Makes devices of the cores; for accelerators, nothing changes.

    Nor does anything where the user has said how many there are, by jax_num_cpu_devices or
    --xla_force_host_platform_device_count, or where jax has started, as in a run over several processes.

    Args:
      examples: of a micro-batch, over all devices.
      parameters: counts those of the model; not called where nothing changes.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if cores() == 1 or jax.config.jax_num_cpu_devices > 0 or "xla_force_host_platform_device_count" in flags:
        return
    count = sharing(examples, parameters())
    if count == 1:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        return
    if importlib.metadata.version("jaxlib").startswith(PATIENT):
        patience = [f"--{name}={FOREVER}" for name in PATIENCE if name not in flags]
        os.environ["XLA_FLAGS"] = " ".join([flags, *patience]).strip()


def sharing(examples: int, parameters: int) -> int:
    """The largest number of cores that share the examples evenly, and for whose copies of the state there is room."""
    room = (of_machine() or 0) // (MEMORY_SHARE * STATE_BYTES * max(parameters, 1))
    return next((n for n in range(min(cores(), examples, room), 1, -1) if examples % n == 0), 1)
