"""Memory: what a run needs at the least, and what there is, so that a hopeless one is refused before it begins."""

import math
import os
from typing import Any

import jax
from flax import nnx

from efficient_tx.checks import OptionError
from efficient_tx.task import Task
from efficient_tx.training.summary import parameter_count


def available() -> int | None:
    """Bytes of memory for one device: its own, else an equal share of this machine's; None if nothing tells."""
    own = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    if all(own):
        return min(own)
    whole = of_machine()
    return whole and whole // jax.local_device_count()


def of_machine() -> int | None:
    """Bytes of this machine's memory; None if nothing tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of a device's memory that a compiled program takes: what it is given and returns, temporaries and code."""
    sizes = compiled.memory_analysis()
    given = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    # On a TPU the temporaries are on-chip ones and the peak has those in main memory; on a CPU the peak has none.
    return max(given + sizes.temp_size_in_bytes, sizes.peak_memory_in_bytes) + sizes.generated_code_size_in_bytes


def check_memory(model: nnx.Module, task: Task, *, features: Any, batch_size: int, grad_accum: int) -> None:
    """Raises OptionError if parameters or a batch cannot fit into the memory of a device, whatever the program does.

    A lower bound, several times below what a run takes: a float32 parameter and its gradient, the inputs of the
    device's rows, and for tokens one activation `[rows, max_len, features]` of a micro-batch in two bytes.

    Args:
      model: may be abstract.
      task: gives the size of an example.
      features: width of the tokens; a model with stages has one for each.
      batch_size: examples of a step, over all devices and processes.
      grad_accum: micro-batches of a device's rows.
    """
    there, parameters = available(), parameter_count(model)
    if there is None:
        return
    if 8 * parameters > there:
        fault = f"{parameters:,} parameters with their gradients take {_gib(8 * parameters)}"
        raise OptionError("model.features", features, f"{fault}, and there are {_gib(there)}: use a smaller model")
    values = math.prod(task.image_shape or (task.max_len,))
    rows = batch_size / jax.device_count()
    activation = 0 if task.kind == "image" else 2 * rows / grad_accum * task.max_len * features
    needed = int(4 * rows * values + activation)
    if needed + 8 * parameters > there:
        fault = f"one step takes more than {_gib(needed)} on a device, and there are {_gib(there)}"
        raise OptionError("batch_size", batch_size, f"{fault}: use a smaller batch_size or a larger grad_accum")


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"
