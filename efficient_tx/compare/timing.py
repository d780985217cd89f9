"""The time of a compiled program, its growth with the length, and predictions that avoid slow calls."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

# Limits of the assumed exponent of growth: that of reading the input, and that of attention over triples.
SLOWEST_GROWTH, FASTEST_GROWTH = 1.0, 3.0

PASSES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Cell:
    """One pass of one variant at one length.

    Attributes:
      seconds: median time of a call; None if `predicted` exceeded the limit and nothing was run.
      predicted: prediction from the shorter lengths; None at the first one.
      temporary_bytes: memory of the compiled program besides its inputs and outputs.
    """

    seconds: float | None
    predicted: float | None = None
    temporary_bytes: int | None = None


def compile_pass(name: str, call: Callable, arrays: Any, *others: Any) -> tuple[Callable[[], Any], int | None]:
    """One pass of `call(arrays, *others)`, compiled: a function to run, and its temporary memory in bytes.

    "forward_backward" returns the output and the gradients of all `arrays` under a random cotangent.
    """
    if name == "forward":
        program, given = call, (arrays, *others)
    else:
        out = jax.eval_shape(call, arrays, *others)
        cotangent = jax.random.normal(jax.random.key(1), out.shape, out.dtype)
        given = (cotangent, arrays, *others)

        def program(cotangent, arrays, *others):
            out, pullback = jax.vjp(lambda arrays: call(arrays, *others), arrays)
            return out, pullback(cotangent)

    compiled = jax.jit(program).lower(*given).compile()
    memory = compiled.memory_analysis()
    return lambda: jax.block_until_ready(compiled(*given)), memory and memory.temp_size_in_bytes


def in_turns(
    runs: Mapping[Hashable, Callable[[], Any]],
    rounds: int,
    max_seconds: float,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[Hashable, float]:
    """Median seconds of each run over up to `rounds` turns, so that slow moments of the machine affect all runs alike.

    The first call is a warm-up. It counts only if another call would exceed `max_seconds` in total. The same limit ends
    the turns.
    """
    seconds = {name: [stopwatch(run)] for name, run in runs.items()}
    for turn in range(rounds):
        progress(f"turn {turn + 1} of {rounds}")
        for name, run in runs.items():
            if sum(seconds[name]) + seconds[name][-1] <= max_seconds:
                seconds[name].append(stopwatch(run))
    return {name: statistics.median(times[1:] or times) for name, times in seconds.items()}


def stopwatch(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def predict(seconds: Mapping[int, float], length: int) -> float | None:
    """Seconds at `length`, predicted from shorter lengths with the growth between the last two.

    With one shorter length the assumed growth is cubic, the steepest; with none the result is None.
    """
    known = sorted(shorter for shorter in seconds if shorter < length)
    if not known:
        return None
    last, growth = known[-1], FASTEST_GROWTH
    if len(known) > 1:
        before = known[-2]
        observed = math.log(seconds[last] / seconds[before]) / math.log(last / before)
        growth = min(max(observed, SLOWEST_GROWTH), FASTEST_GROWTH)
    return seconds[last] * (length / last) ** growth


def exponent(seconds: Mapping[int, float]) -> float | None:
    """The p of the power law seconds ∝ length^p that fits best, by least squares of the logarithms."""
    if len(seconds) < 2:
        return None
    slope, _ = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)
    return float(slope)


def machine() -> str:
    """The device and the versions of a measurement."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
        name = f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    versions = ", ".join(f"{package} {version(package)}" for package in ("jax", "jaxlib", "flax"))
    return f"{device.platform}: {name}; {versions}, Python {platform.python_version()}"
