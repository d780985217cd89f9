"""The chips that programs are compiled for without having them.

A TPU is named by a topology of libtpu (package of `jax[tpu]`), a GPU described to XLA's CUDA plugin (packages
jax-cuda13-plugin and jax-cuda13-pjrt) by the limits in NVIDIA's data sheets and its CUDA programming guide (compute
capabilities); the fields are those of XLA's GpuTargetConfigProto.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Target:
    """One chip.

    Attributes:
      name: as people say it, in lower case.
      platform: jax's name of its platform.
      gate: whether kernels must compile and keep their limits there; for the others the figures are recorded.
      on_chip: bytes of on-chip memory that one kernel may use.
      describe: the keywords of `jax.experimental.topologies.get_topology_desc`.
      architecture: the name of a GPU's instruction set, for ptxas.
    """

    name: str
    platform: str
    gate: bool
    on_chip: int
    describe: Callable[[], dict[str, str]]
    architecture: str | None = None

    def __reduce__(self):  # as its name: how it is described is a function
        return target_of, (self.name,)

    @property
    def implementation(self) -> str:
        """The implementation that is meant for it."""
        return {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}[self.platform]

    def devices(self, count: int = 1) -> list[Any]:
        """Devices of one host to compile for; a TPU's host has at least four."""
        return topology(self, count).devices[:count]


def tpu(name: str, topology: str, vmem: int, gate: bool = False) -> Target:
    return Target(name, "tpu", gate, vmem, lambda: {"platform": "tpu", "topology_name": topology})


def gpu(
    name: str, *, capability: tuple[int, int], cores: int, units: int, shared: int, clock: float, bandwidth: int,
    l2: int, memory: int, gate: bool = False,
) -> Target:  # fmt: skip
    """A GPU of NVIDIA's.

    Args:
      name: of the target.
      capability: compute capability; from 9 on with the instructions of that architecture alone ("sm_90a").
      cores: number of streaming multiprocessors.
      units: float32 units of one.
      shared: bytes of shared memory of one; a block may have 1 KiB less.
      clock: GHz, boosted.
      bandwidth: of its main memory, bytes a second.
      l2: bytes of cache.
      memory: bytes of main memory.
      gate: see `Target`.
    """
    major, minor = capability
    specific = major >= 9
    limits = {
        "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
        "shared_memory_per_block": 48 * KIB, "shared_memory_per_block_optin": shared - KIB,
        "shared_memory_per_core": shared, "registers_per_block_limit": 1 << 16, "registers_per_core_limit": 1 << 16,
        "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 2**16 - 1, "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
        "core_count": cores, "fpus_per_core": units, "clock_rate_ghz": clock, "memory_bandwidth": bandwidth,
        "l2_cache_size": l2, "device_memory_size": memory,
    }  # fmt: skip
    extension = "ACCELERATED_FEATURES" if specific else "NONE"
    compute = f"cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}"
    info = " ".join(f"{field}: {value}" for field, value in limits.items())
    described = f'gpu_device_info {{ {info} {compute} }} platform_name: "CUDA" device_description_str: "{name}"'
    architecture = f"sm_{major}{minor}{'a' if specific else ''}"
    description = {"platform": "cuda", "topology_name": name, "target_config": described}
    return Target(name, "cuda", gate, shared - KIB, lambda: dict(description), architecture)


# VMEM: what libtpu grants a kernel that does not ask for more.
TARGETS = {
    target.name: target
    for target in (
        tpu("v5e", "v5e:2x2", 16 * MIB, gate=True),
        tpu("v6e", "v6e:2x2", 32 * MIB, gate=True),
        gpu("a100", capability=(8, 0), cores=108, units=64, shared=164 * KIB, clock=1.41, bandwidth=2_039 * 10**9,
            l2=40 * MIB, memory=80 * GIB, gate=True),
        gpu("h100", capability=(9, 0), cores=132, units=128, shared=228 * KIB, clock=1.98, bandwidth=3_350 * 10**9,
            l2=50 * MIB, memory=80 * GIB, gate=True),
        tpu("v4", "v4:2x2x1", 16 * MIB),
        tpu("v5p", "v5p:2x2x1", 16 * MIB),
        tpu("tpu7x", "tpu7x:2x2x1", 32 * MIB),
        gpu("b200", capability=(10, 0), cores=148, units=128, shared=228 * KIB, clock=1.965, bandwidth=8_000 * 10**9,
            l2=126 * MIB, memory=180 * GIB),
    )
}  # fmt: skip


def target_of(name: str) -> Target:
    return TARGETS[name]


@cache
def topology(target: Target, count: int = 1) -> Any:
    from jax.experimental import topologies

    described = target.describe()
    if target.platform == "cuda":
        described["topology"] = f"1x1x{count}"  # slices, hosts and devices
    else:
        schedules()
    return topologies.get_topology_desc(**described)


@cache
def schedules() -> Path:
    """The folder in which libtpu writes the schedule of every kernel that this process compiles.

    libtpu reads the environment when it is loaded, which is at the first topology: no earlier import matters. A machine
    has no TPU to ask about itself, and several processes compile at once.
    """
    folder = Path(tempfile.mkdtemp(prefix="schedules-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    defaults = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["LIBTPU_INIT_ARGS"] = " ".join((
        os.environ.get("LIBTPU_INIT_ARGS", ""), f"--xla_jf_dump_to={folder}", "--xla_jf_dump_llo_text=true",
        f"--xla_jf_dump_llo_pass_label_regex={SCHEDULE}",
    ))  # fmt: skip
    return folder


# The one file of those of a kernel that is read: a line for each bundle, with the slots of each unit that it fills.
SCHEDULE = "final_hlo-static-per-bundle-utilization"
