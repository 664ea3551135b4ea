"""Memory that a training step frees is kept for the next: in processes that compute on CPUs, with glibc.

XLA for CPUs allocates a step's temporary memory anew each time. By default glibc gives it back to the system after the
step, which then clears every page of it for the next: a fifth of the time of a step of GPT-2. JAX is not imported here,
because a process that starts anew shall not have waited for it.
"""

import ctypes
import os
import platform
import sys
from importlib.util import find_spec

from runtime.config import ACCELERATORS

# Options of glibc's malloc.h: blocks of any size (M_MMAP_MAX) come from one heap (M_ARENA_MAX) that never shrinks
# (M_TRIM_THRESHOLD), and a freed chunk always grows together with its free neighbours (M_MXFAST).
MALLOPT = {-4: 0, -8: 1, -1: -1, 1: 0}
MALLOPT_DEFAULTS = {-4: 65536, -1: 2**17, 1: 128}
# Not so the chunks, up to seven of each small size, that a thread keeps in a cache of its own: one that was cut off
# the end of a large block makes that block too small for the next step. Only the environment turns these caches off.
TUNABLES, NO_CACHES = "GLIBC_TUNABLES", "glibc.malloc.tcache_count=0"
UNDIVIDED = NO_CACHES in os.environ.get(TUNABLES, "").split(":")
# Blocks of a step's memory that a heap may grow to. Seen were 2, as a step may begin before the last has ended, and 6.
BLOCKS = 3 if UNDIVIDED else 7
ROOM_BYTES = 2**29
HOLES = 4096  # that are filled at most; seen were 350
_keeps = False


def start_undivided() -> None:
    """Starts this process anew, without caches of threads, where it was started as `python SCRIPT ...`.

    To be called before the slow imports. Not where an accelerator may compute, under a debugger or as a module.
    """
    given = os.environ.get(TUNABLES, "").split(":")
    if UNDIVIDED:  # processes that this one starts shall be as they were
        if rest := [x for x in given if x != NO_CACHES]:
            os.environ[TUNABLES] = ":".join(rest)
        else:
            del os.environ[TUNABLES]
        return
    flags = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv)]
    plain = sys.orig_argv[len(flags) + 1 :] == sys.argv and all(x.startswith("-") and x != "-m" for x in flags)
    if plain and _is_glibc() and not any(map(find_spec, ACCELERATORS)):
        tunables = ":".join([*filter(None, given), NO_CACHES])
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {TUNABLES: tunables})


def keep_freed_memory() -> None:
    """Lets this process keep memory that it frees, where its C library is glibc."""
    global _keeps
    _keeps = _is_glibc()
    _set(MALLOPT)


def make_room(step_bytes: int) -> None:
    """To be called before the first step, whose temporary memory this is, once all that stays is allocated.

    Room for small objects, and behind it a block for the step: glibc gives the smallest chunk that does, and objects
    cut off the step's block would leave it too small for the next step. Where the heap could grow to more than
    there is free memory, nothing is kept. Without `keep_freed_memory` before, nothing happens.
    """
    if not _keeps:
        return
    if BLOCKS * step_bytes > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        _set(MALLOPT_DEFAULTS)
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    room = min(ROOM_BYTES, step_bytes // 2)
    chunks = [_set_apart(libc, size) for size in (room, step_bytes + 2 * room)]  # address space, until it is used
    for chunk in chunks:
        libc.free(chunk)


def _set_apart(libc: ctypes.CDLL, size: int) -> int | None:
    """A chunk with another right behind it that stays; None where so much address space is not allowed."""
    chunk = libc.malloc(size)
    for _ in range(HOLES if chunk else 0):
        if (libc.malloc(2**16) or 0) > chunk:
            break  # before that, holes were filled that lie before the chunk
    return chunk


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _set(options: dict[int, int]) -> None:
    if _is_glibc():
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)
