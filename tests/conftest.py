"""Set before jax is imported: one OpenBLAS thread (its threads collide with XLA's) and four fake CPU devices.

Most of the time goes into compiling programs that run once, so LLVM does not optimise them: half the time; nor does it
get them in parts to be compiled side by side: a third of the rest. jaxlib 0.10 compiles twice as fast again by its
older emitter of fusions, which later versions no longer have. train.py and eval.py as processes of their own do so too,
unless a test asks for programs as users have them.
"""

import collections
import contextlib
import ctypes
import gc
import importlib.metadata
import os
import re
import resource
import signal
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10.")
)

import jax
import pytest

jax.config.update("jax_platforms", "cpu")  # also where plugins are installed to compile for accelerators
jax.config.update("jax_num_cpu_devices", 4)

gc.set_threshold(50_000, 20, 20)  # tracing makes many objects that live: Python's own threshold costs 6 % of the time

# Compiled programs of the tests, whatever $EFFICIENT_TX_DATA is: the second run of a file takes a third of the time.
PROGRAMS = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "efficient_tx" / "test-programs"
MOST_BYTES = 2**30  # jax_compilation_cache_max_size would look at every file whenever it writes one


def pytest_configure(config):
    """Keeps compiled programs, where the folder can be written; several workers may do so at once.

    Ctrl-C and the end of a terminal are what tests send, to processes of their own and to this one: a background of a
    script, which ignores the one, and nohup, which ignores the other, would have them ignored here too.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    try:
        PROGRAMS.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(PROGRAMS, os.R_OK | os.W_OK | os.X_OK):
        if not hasattr(config, "workerinput"):
            drop_oldest(PROGRAMS, MOST_BYTES)
        jax.config.update("jax_compilation_cache_dir", str(PROGRAMS))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        # Else the folder's name is a part of what a program is looked up by.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def drop_oldest(folder, most):
    """Deletes the files that were written first, until the others have `most` bytes or less."""
    files = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in os.scandir(folder))
    total = sum(size for _, size, _ in files)
    for _, size, path in files:
        if total <= most:
            return
        Path(path).unlink(missing_ok=True)
        total -= size


def pytest_warning_recorded(warning_message):
    """Deletes a stored program that cannot be read, as a killed process leaves it; it is compiled and stored anew."""
    broken = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", str(warning_message.message))
    for file in PROGRAMS.glob(f"{broken[1]}-*") if broken else ():
        file.unlink(missing_ok=True)


# A compiled program takes dozens of memory mappings; beyond 65,530 of them, Linux's default, a process dies. Three
# workers that keep all their programs to the end of the slow tests take 24 GB, and a machine without that much crawls.
MOST_MAPPINGS = 40_000
MOST_MEMORY = 1.5 * 2**30  # bytes


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of all compiled programs after a file, once they are many or large."""
    yield
    process = Path("/proc/self")
    if not process.exists():
        return
    resident = int((process / "statm").read_text().split()[1]) * resource.getpagesize()
    if resident > MOST_MEMORY or len((process / "maps").read_text().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # glibc keeps nine tenths of what was freed until it is told
            ctypes.CDLL(None).malloc_trim(0)


# Files that take long, in that order; what takes a second or two fills the gaps at the end.
LONGEST = (
    "tests/training/test_faults.py",
    "tests/config/test_dead_keys.py",
    "tests/lra/test_tasks.py",
    "tests/training/test_stages.py",
    "tests/training/test_processes.py",
    "tests/test_damage.py",
    "tests/training/test_densify.py",
    "tests/lra/pathfinder/test_drawing.py",
    "tests/training/test_loop.py",
    "tests/test_train.py",
    "tests/training/test_distributed.py",
    "tests/test_own.py",
    "tests/compression/test_methods.py",
    "tests/compression/test_swapping.py",
    "tests/compress/test_compress.py",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of a test with `first(n)` the first n cases run at once, the others are slow. Slow ones are not quick.

    The longest files start first; the others stay as they are.
    """
    cases = collections.Counter()
    for item in items:
        if first := item.get_closest_marker("first"):
            test = item.nodeid.partition("[")[0]
            cases[test] += 1
            if cases[test] > first.args[0]:
                item.add_marker(pytest.mark.slow)
    if config.option.markexpr == "quick":
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    place = {file: number for number, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(LONGEST)))


@pytest.hookimpl(optionalhook=True)  # where xdist is off
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, or where they run over a table those of one row: they share programs."""
    from xdist.scheduler import LoadScopeScheduling

    from efficient_tx.attention import ATTENTION
    from efficient_tx.kernels.case import OPERATIONS
    from efficient_tx.linear import LINEAR

    class ByRow(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            row = re.search(r"\[(\w+)", test)
            return f"{file} {row[1]}" if row and row[1] in (*ATTENTION, *LINEAR, *OPERATIONS) else file

    config.option.loadscopereorder = False  # xdist's own order is by the number of tests, not by how long they take
    return ByRow(config, log)
