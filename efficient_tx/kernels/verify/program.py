"""A program compiled ahead of time for a chip, and what its compilers say about the kernels in it.

For a TPU libtpu schedules every kernel; for a GPU XLA stops at PTX, which ptxas of the CUDA toolkit assembles here.
"""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from efficient_tx.kernels.verify.targets import SCHEDULE, Target, schedules

# A program is compiled ten times as fast so. Kernels do not change; around them more stays in main memory.
QUICKLY = {"exec_time_optimization_effort": -1.0}
# As XLA has it, whatever XLA_FLAGS says: tests have it not optimise what they run on a CPU.
OPTIMISED = {"xla_backend_optimization_level": 3}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a program; None is what its platform does not have.

    Attributes:
      name: that of its Pallas call, or the target of another library's custom call.
      on_chip: bytes of VMEM on a TPU, of shared memory of a block on a GPU.
      instructions: bundles of instructions on a TPU, instructions of PTX on a GPU, both of the code, not of a run.
      spills: instructions that write registers to memory for want of registers (TPU), bytes written and read so (GPU).
      matrix_share: share of the slots for matrix products that its bundles fill, on a TPU.
      registers: of a thread, on a GPU.
      tf32: instructions that round float32 to 10 bits, on a GPU.
    """

    name: str
    on_chip: int | None = None
    instructions: int | None = None
    spills: int | None = None
    matrix_share: float | None = None
    registers: int | None = None
    tf32: int | None = None


@dataclass(frozen=True)
class Program:
    """Attributes:
    source: a digest of what was compiled.
    seconds: time of the compilation.
    arguments, outputs, temporaries: bytes of main memory.
    loops: number of loops of the program, outside of kernels.
    kernels: every kernel, once where it is called several times.
    text: the compiled program.
    """

    source: str
    seconds: float
    arguments: int
    outputs: int
    temporaries: int
    loops: int
    kernels: tuple[Kernel, ...]
    text: str


def lowered(function: Callable, *arguments: Any, target: Target) -> jax.stages.Lowered:
    """Lowers a function of shapes and dtypes (trees of them) for a target."""
    on = SingleDeviceSharding(target.devices()[0])
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on), arguments)
    return jax.jit(function).lower(*placed)


def compiled(function: Callable, *arguments: Any, target: Target) -> Program:
    """`program` of a function of shapes and dtypes (trees of them)."""
    return program(lowered(function, *arguments, target=target), target)


def digest(lowered: jax.stages.Lowered) -> str:
    """Changes with what is compiled, and with the lines at which the kernels stand in their files."""
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()[:12]


def program(lowered: jax.stages.Lowered, target: Target, *, quickly: bool = True) -> Program:
    """Compiles what was lowered for devices of a target; for a TPU as a user does, or quickly what is around kernels.

    Raises:
      jax.errors.JaxRuntimeError: the compiler's word, where a kernel is not legal or does not fit.
      FileNotFoundError: there is no ptxas.
    """
    folder = Path(tempfile.mkdtemp(prefix="program-"))
    began = time.perf_counter()
    try:
        if target.platform == "tpu":
            clear(schedules())
            done = compile_anew(lowered, QUICKLY if quickly else {})
        else:
            done = compile_anew(lowered, OPTIMISED | {"xla_dump_to": str(folder)})
        seconds, text = time.perf_counter() - began, done.as_text()
        kernels = tpu_kernels(text) if target.platform == "tpu" else gpu_kernels(text, folder, target)
    finally:
        shutil.rmtree(folder)
    memory = done.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    return Program(digest(lowered), seconds, *sizes, len(LOOP.findall(text)), tuple(dict.fromkeys(kernels)), text)


def compile_anew(lowered: jax.stages.Lowered, options: dict[str, str | int | float]) -> jax.stages.Compiled:
    """Keeps the program out of jax's cache on disk: what is found there is not compiled, and no dump is written."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float("inf"))
    try:
        return lowered.compile(compiler_options=options)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


def clear(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


CALL = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*custom_call_target="([^"]+)"(.*)$', re.MULTILINE)
LOOP = re.compile(r"^\s*(?:ROOT )?%?\S+ = .* while\(", re.MULTILINE)


def tpu_kernels(text: str) -> list[Kernel]:
    calls = [(name, rest) for name, call, rest in CALL.findall(text) if call == "tpu_custom_call"]
    kernels = []
    for name, rest in calls:
        written = list(schedules().glob(f"*-{name}-*-{SCHEDULE}.txt"))
        if not written:  # libtpu compiles calls that are equal once
            continue
        found = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', rest)
        on_chip = int(found[1]) if found else None
        kernels.append(Kernel(re.sub(r"\.\d+$", "", name), on_chip, **schedule(*written)))
    if calls and not kernels:
        raise FileNotFoundError(f"libtpu wrote no schedule for {', '.join(name for name, _ in calls)}")
    return kernels


def schedule(path: Path) -> dict[str, float]:
    """Figures of a schedule that libtpu wrote for a custom call."""
    lines = path.read_text().splitlines()
    units = dict(
        zip(re.split(r",\s*", lines[1].strip()), zip(*(map(int, line.split()) for line in [lines[2], *lines[4:]])))
    )
    (slots, *matrix), (_, *spills) = units["MXU"], units["VSTORE:SPILL"]
    return {
        "instructions": len(matrix),
        "spills": sum(spills),
        "matrix_share": round(sum(matrix) / (slots * len(matrix)), 4),
    }


def gpu_kernels(text: str, folder: Path, target: Target) -> list[Kernel]:
    """Triton's kernels with their PTX, and other libraries' custom calls."""
    sources = {
        found[1]: path for path in folder.glob("*.ptx") if (found := re.search(r"\.entry (\w+)", path.read_text()))
    }
    (thunks,) = folder.glob("*.thunk_sequence.txt")
    shared = dict(re.findall(r" (\w+) grid: .* shared_memory: (\d+) bytes", thunks.read_text()))
    kernels = []
    for _, call, rest in CALL.findall(text):
        if call != "__gpu$xla.gpu.triton":
            kernels.append(Kernel(call))
            continue
        name = re.search(r'\bname = "(\w+)"', rest)[1]
        kernels.append(Kernel(name, int(shared[name]), **assembled(sources[name], target.architecture)))
    return kernels


def ptxas() -> str:
    """NVIDIA's assembler, of the package nvidia-cuda-nvcc or else on the path.

    Raises:
      FileNotFoundError: there is none.
    """
    try:
        package = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        package = None
    for folder in package.submodule_search_locations if package else ():
        if (path := Path(folder) / "bin" / "ptxas").exists():
            return str(path)
    if found := shutil.which("ptxas"):
        return found
    raise FileNotFoundError("no ptxas: pip install nvidia-cuda-nvcc, or put that of a CUDA toolkit on the path")


@cache
def ptxas_version() -> str:
    """ "13.0.88", or "none"."""
    try:
        said = subprocess.run([ptxas(), "--version"], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        return "none"
    return re.search(r"V([\d.]+)", said)[1]


def assembled(ptx: Path, architecture: str) -> dict[str, int]:
    """Figures of the one kernel in a file of PTX."""
    done = subprocess.run(
        [ptxas(), f"-arch={architecture}", "-v", str(ptx), "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    code = re.findall(r"^\s+(?:@!?%p\d+ )?[a-z]\S*.*;$", ptx.read_text(), re.MULTILINE)
    return {
        "instructions": len(code),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)),
        "registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]),
        "tf32": sum("tf32" in line for line in code),
    }
