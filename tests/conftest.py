"""Set before jax is imported: one OpenBLAS thread (its threads collide with XLA's) and four fake CPU devices.

Most of the time goes into compiling programs that run once, so LLVM does not optimise them: half the time. The tests
of train.py and eval.py, which are processes of their own, run what users run.

XLA gets more threads than devices: jaxlib 0.10.2's batched Cholesky holds a thread while it waits for others, and with
as many of them at once as there are threads, one for each fake device, all wait for ever.
"""

import os
import re
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


def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, or where they run over a table those of one row: they share programs."""
    from xdist.scheduler import LoadScopeScheduling

    from efficient_tx.attention import ATTENTION
    from efficient_tx.linear import LINEAR

    class ByRow(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            row = re.search(r"\[(\w+)", test)
            return f"{file} {row[1]}" if row and row[1] in (*ATTENTION, *LINEAR) else file

    return ByRow(config, log)
