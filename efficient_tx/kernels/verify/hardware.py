"""The kernels on the accelerator of this machine: their errors beside float64 on the host, and times beside others'."""

import itertools
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from efficient_tx.kernels.case import Case, cases_of, label, production, short, small
from efficient_tx.kernels.verify import accuracy
from efficient_tx.kernels.verify.cover import cover
from efficient_tx.kernels.verify.peers import beside
from efficient_tx.kernels.verify.training import MIXERS, listops_step

# The implementation whose kernels are for a platform, by jax's name of a device's platform.
KERNELS = {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}

BATCH_SECONDS, BATCHES = 0.02, 7  # of calls between two synchronisations, and how many such


@dataclass(frozen=True)
class Clock:
    """Ends a part of the work in time.

    Attributes:
      seconds: that there are.
      began: when.
    """

    seconds: float
    began: float

    @classmethod
    def start(cls, seconds: float) -> "Clock":
        return cls(seconds, time.monotonic())

    def spent(self) -> bool:
        return time.monotonic() - self.began > self.seconds


def accelerator() -> jax.Device:
    """The first accelerator.

    Raises:
      ValueError: there is none.
    """
    device = jax.devices()[0]
    if device.platform not in KERNELS:
        raise ValueError(f"jax finds no accelerator, only {device.platform}: --all verifies what needs none")
    return device


def driver() -> str:
    """The version of the driver, as the vendor's tool or jax's client tells it."""
    if tool := shutil.which("nvidia-smi"):
        asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout:
            return done.stdout.splitlines()[0].strip()
    return " ".join(jax.devices()[0].client.platform_version.split())


def rounds(operations: Collection[str], rows_of: Callable[[str], Iterator]) -> list[tuple[str, dict[str, Any]]]:
    """A selection of each operation's cases with every pair of values, by turns: those that cover most come first."""
    found = []
    for operation in operations:
        rows = list(rows_of(operation))
        found += [(turn, operation, rows[number]) for turn, number in enumerate(cover(rows, 2))]
    return [(operation, values) for _, operation, values in sorted(found, key=lambda one: one[0])]


def checked(
    operations: Collection[str],
    implementation: str,
    clock: Clock,
    seed: int,
    progress: Callable[[str], Any],
    **how: Any,
) -> Iterator[dict[str, Any]]:
    """Runs cases of few tokens forward and backward, with the sizes that an operation is used with and with small ones.

    Yields:
      a row for each that there was time for: its errors, or "failed".
    """
    for operation, values in rounds(operations, lambda operation: itertools.chain(short(operation), small(operation))):
        case = cases_of(operation).case(**values)
        if clock.spent() or implementation in case.without:
            continue
        name = label(operation, values)
        progress(f"error of {name}")
        row = {"name": name, "implementation": implementation}
        try:
            row |= accuracy.errors(case, seed, implementation=implementation, **how)
        except Exception as error:  # a kernel that does not run is a finding; the others run on
            yield row | {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        else:
            yield row | {"most": accuracy.most(case)}


def timed(
    operations: Collection[str], clock: Clock, seed: int, progress: Callable[[str], Any],
    rows_of: Callable[[str], Iterator] = production, peers: Callable[..., dict[str, Callable]] = beside,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Times production cases: the operation as it chooses, its XLA form, and its peers. Yields a row for each pass."""
    for operation, values in rounds(operations, rows_of):
        module = cases_of(operation)
        case = module.case(**values)
        others = peers(operation, values, jax.default_backend())
        functions = {
            "ours": case.function,
            "xla": lambda *a, case=case: case.function(*a, implementation="xla"),
        } | others
        for which in ("forward", "gradient"):
            if clock.spent():
                return
            progress(f"time of {label(operation, values)} {which}")
            row = {"name": f"{label(operation, values)} {which}", "milliseconds": {}, "failed": {}}
            for name, function in functions.items():
                one = Case(function, case.arrays, case.draws)
                try:
                    row["milliseconds"][name] = 1e3 * seconds_of(one, which, seed)
                except Exception as error:  # out of memory, or a peer without this case: it has no time
                    row["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield row


def seconds_of(case: Case, which: str, seed: int) -> float:
    """The median time of a call, over batches of calls that are awaited together."""
    arrays = on_device(case, seed)
    arguments = (arrays,) if which == "forward" else (arrays, jax.tree.map(jnp.ones_like, zeros(case.outputs())))
    call = jax.jit(getattr(case, which)())
    return median_seconds(lambda _: call(*arguments))


def median_seconds(call: Callable[[Any], Any]) -> float:
    """The median time of a call that takes the result of the one before, after two that do not count."""
    found = jax.block_until_ready(call(None))

    def run(times: int) -> float:
        nonlocal found
        began = time.perf_counter()
        for _ in range(times):
            found = call(found)
        jax.block_until_ready(found)
        return time.perf_counter() - began

    times = max(1, round(BATCH_SECONDS / max(run(1), 1e-6)))
    return statistics.median(run(times) for _ in range(BATCHES)) / times


def trained(clock: Clock, progress: Callable[[str], Any], **sizes: int) -> Iterator[dict[str, Any]]:
    """Times the paper's training step with each mixer, on one device. Yields a row: tokens a second, or "failed"."""
    for mixer in MIXERS:
        if clock.spent():
            return
        progress(f"training step with {mixer}")
        try:
            step, first, batch = listops_step(mixer, jax.local_devices()[:1], **sizes)
            seconds = median_seconds(lambda state, step=step, first=first, batch=batch: step(state or first, batch))
        except Exception as error:  # as in `timed`
            yield {"name": mixer, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        else:
            yield {"name": mixer, "tokens_per_second": batch["mask"].size / seconds}


def zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def on_device(case: Case, seed: int) -> tuple[jax.Array, ...]:
    """Arrays of the case, standard normal ones drawn on the device: they may be large."""
    keys = jax.random.split(jax.random.key(seed), len(case.arrays))
    return case.filled(seed, lambda n, x: jax.random.normal(keys[n], x.shape, x.dtype))
