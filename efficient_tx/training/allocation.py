"""Memory of a process that computes on the CPU: what a step frees stays with the process for the next one."""

import ctypes

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Tells glibc's allocator to return no memory to the system; other allocators and systems are left as they are.

    By default it maps every large buffer anew, so that the system clears each step's activations page by page: half
    the time of a training step of a small model. Only the one arena on the heap can be told not to, hence one arena.
    Peak memory stays about the same. To be called before the first computation, which starts the threads that would
    take arenas of their own.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in ((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_MAX, 0), (_ARENA_MAX, 1)):
            mallopt(parameter, value)
