"""Set before jax is imported: one OpenBLAS thread (its threads collide with XLA's) and four fake CPU devices.

Most of the time goes into compiling programs that run once, so LLVM does not optimise them: half the time. The tests
of train.py and eval.py, which are processes of their own, run what users run.

XLA gets more threads than devices: jaxlib 0.10.2's batched Cholesky holds a thread while it waits for others, and with
as many of them at once as there are threads, one for each fake device, all wait for ever.
"""

import os
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)


# A compiled program takes dozens of memory mappings; beyond 65,530 of them, Linux's default, a process dies.
MOST_MAPPINGS = 20_000


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """Lets go of all compiled programs after a file, once they are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_text().splitlines()) > MOST_MAPPINGS:
        jax.clear_caches()


def pytest_collection_modifyitems(items):
    """A file's tests run in one process, or where they run over a table those of one row: they share programs."""
    for item in items:
        row = getattr(item, "callspec", None) and item.callspec.params.get("name")
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {row}" if row else item.path.stem))
