"""Freed memory -> memory for the next step.

Each step on a CPU allocates the same large blocks. glibc gives such blocks back to the kernel when they are freed, and
gets them again page by page, which takes longer than what a small base computes in them.
"""

import ctypes
import platform

# malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Has this process keep what it frees, from threads that start later too. Does nothing beside another libc."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, LARGEST_INT)
    # Of the arenas that other threads would get, each large block is one that is given back whole.
    libc.mallopt(M_ARENA_MAX, 1)
