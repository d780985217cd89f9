"""Freed memory stays with the process: the second time, a large block brings no page faults."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource
from efficient_tx.training.allocation import keep_freed_memory
if {kept}: keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(2**28)
    libc.memset(block, 1, 2**28)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is that of Linux")
def test_a_block_is_used_again():
    def faults(kept):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(kept=kept)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    # A page has 4 to 64 KiB, so 256 MiB have 4,096 or more of them.
    assert faults(kept=True) < 400 < 4000 < faults(kept=False)
