"""Chips: their memory, and the two rates of the roofline."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_tx.kernels.verify.program import QUICKLY
from efficient_tx.kernels.verify.targets import GIB, TARGETS
from efficient_tx.training.devices import cores
from efficient_tx.training.memory import available

TERA, GIGA = 10**12, 10**9
# The packages that compile for a platform; the extra [aot] brings them.
PLUGINS = {"tpu": ("libtpu",), "cuda": ("jax_cuda13_plugin",)}


@dataclass(frozen=True)
class Chip:
    """One device that trains.

    Attributes:
      name: of the target.
      memory: bytes that a program may take.
      peak: dtype -> operations of matrix products a second, at the precision that jax takes by default.
      bandwidth: bytes a second of the main memory.
    """

    name: str
    memory: int
    peak: dict[str, float]
    bandwidth: float

    def devices(self) -> list[Any]:
        """The device to compile for."""
        return jax.local_devices()[:1] if self.name == "cpu" else TARGETS[self.name].devices(1)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Of XLA, which takes a tenth of the time so on a TPU, where programs take up to a tenth more memory.

        On a CPU it saves a third: LLVM, which then does not optimise, comes after memory is laid out.
        """
        if self.name == "cpu":
            return {"xla_backend_optimization_level": 0}
        return QUICKLY if TARGETS[self.name].platform == "tpu" else {}

    def bound(self, flops: float, moved: int, dtype: str) -> float:
        """Seconds of the roofline (Williams, Waterman and Patterson 2009): the slower of products and main memory."""
        return max(flops / self.peak[dtype], moved / self.bandwidth)


def chip(name: str, float32: float, bfloat16: float, bandwidth: float, memory: float) -> Chip:
    return Chip(name, int(memory * GIB), {"float32": float32 * TERA, "bfloat16": bfloat16 * TERA}, bandwidth * GIGA)


# Rates without sparsity. By default jax multiplies float32 on these GPUs as TF32 and on TPUs as bfloat16. Of a GPU jax
# takes three quarters, of a TPU all but a quarter GiB. Sources: NVIDIA's data sheets "A100 80GB SXM" (2022) and "H100
# SXM" (2023); Google's pages "TPU v5e" and "TPU v6e", cloud.google.com/tpu/docs.
DATA_SHEETS = {
    made.name: made
    for made in (
        chip("v5e", float32=197, bfloat16=197, bandwidth=819, memory=15.75),
        chip("v6e", float32=918, bfloat16=918, bandwidth=1640, memory=31.75),
        chip("a100", float32=156, bfloat16=312, bandwidth=2039, memory=0.75 * 80),
        chip("h100", float32=494.7, bfloat16=989.4, bandwidth=3350, memory=0.75 * 80),
    )
}
NAMES = ("cpu", *DATA_SHEETS)


def plugins(name: str) -> Sequence[str]:
    """The packages that compiling for one of NAMES needs beside jax."""
    return () if name == "cpu" else PLUGINS[TARGETS[name].platform]


def chip_of(name: str) -> Chip:
    """The chip of one of NAMES; this machine is measured, which takes a second."""
    return DATA_SHEETS[name] if name != "cpu" else this_machine()


def this_machine() -> Chip:
    """The best of a few products of matrices and copies by all cores, on one of jax's devices."""
    product = jax.jit(jnp.matmul)

    def rate(dtype: str) -> float:
        a = jnp.ones((1024, 1024), dtype)
        return 2 * 1024**3 / fastest(lambda: jax.block_until_ready(product(a, a)))

    # One core alone does not fill the memory of a machine with many.
    count = cores()
    each = max(1 << 22, (1 << 25) // count)  # more than the caches hold
    source, target = np.ones((count, each), np.float32), np.zeros((count, each), np.float32)
    with ThreadPoolExecutor(count) as pool:
        bandwidth = 2 * source.nbytes / fastest(lambda: list(pool.map(np.copyto, target, source)))
    return Chip("cpu", available() or 0, {dtype: rate(dtype) for dtype in ("float32", "bfloat16")}, bandwidth)


def fastest(call: Callable[[], Any], turns: int = 5) -> float:
    """Seconds; the first call, which may compile, does not count."""
    call()
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)
