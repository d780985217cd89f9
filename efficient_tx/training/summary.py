"""Summary: figures of a finished run beside its scores: parameters, speed, memory, versions, device."""

import importlib.metadata
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from efficient_tx.training.history import Line


def steps_per_second(lines: list[Line], batch_size: int) -> float | None:
    """Training speed over all processes of a run, from its train lines; None if no step was timed."""
    timed = [line for line in lines if line["split"] == "train" and line.get("examples_per_second")]
    seconds = sum(line["seconds"] for line in timed)
    return (
        sum(line["examples_per_second"] * line["seconds"] for line in timed) / seconds / batch_size if timed else None
    )


def metric(result: Mapping[str, Any]) -> str:
    """The name of the score in a summary that ranks checkpoints, "accuracy"."""
    return next(key.removeprefix("val_") for key in result if key.startswith("val_"))


def higher_is_better(result: Mapping[str, Any]) -> bool:
    """Whether a higher score is better in a summary; those of older versions do not say it of a metric of one's own."""
    return result.get("higher_is_better", metric(result) != "loss")


def parameter_count(model: nnx.Module) -> int:
    """Number of scalar parameters of the model; a layer that counts its own, such as a sparse one, is asked."""

    def stored(module):
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

    own = {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(getattr(type(module), "parameters", None), property)
    }
    whole = [path for path in own if not any(path[:size] in own for size in range(len(path)))]
    return stored(model) + sum(own[path].parameters - stored(own[path]) for path in whole)


def parameters_by_module(model: nnx.Module) -> dict[str, int]:
    """Numbers stored in the parameters of each part of the model: "encoder.blocks.mlp" for those of all blocks."""
    counts: dict[str, int] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        names = [name for name in path if isinstance(name, str)]
        part = ".".join(names[:-1][:3] or names)
        counts[part] = counts.get(part, 0) + sum(x.size for x in jax.tree.leaves(leaf))
    return counts


def peak_memory() -> dict[str, int | str]:
    """`peak_memory_bytes`: largest use; `peak_memory_of`: "device" if the devices report it, else "process"."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    if all(peaks):
        return {"peak_memory_bytes": max(peaks), "peak_memory_of": "device"}
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_memory_bytes": peak, "peak_memory_of": "process"}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the numbers."""
    packages = ("efficient-tx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def commit() -> str | None:
    """The commit of this code, with "-dirty" if files differ from it; None outside of its checkout, or without git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # an environment inside another project's checkout
            return None
        return git("rev-parse", "HEAD")[:12] + "-dirty" * bool(git("status", "-s", "-uno"))
    except (OSError, subprocess.TimeoutExpired):
        return None


def device() -> dict[str, Any]:
    """The devices of the run."""
    kind = jax.devices()[0]
    return {
        "platform": kind.platform,
        "kind": kind.device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }
