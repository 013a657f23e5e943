"""glibc's heap, told how training uses it: large tensors that come and go many times a second.  Knows no torch.

torch asks for tensors aligned to 64 bytes, and glibc cuts what is over from both ends of a block.  These slivers, and
freed blocks as small, are put aside for the next small object instead of being joined to their neighbours, and a gap
between two of them is too small for the next tensor of its own size.  So a step leaves hundreds of MB in such gaps.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress

_TUNABLES = "GLIBC_TUNABLES"
_NO_THREAD_CACHE = "glibc.malloc.tcache_count=0"
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST_FAST = -1, -3, 1  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MXFAST
_MOST_HEAPS = -8  # M_ARENA_MAX


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next allocation, joined; True where there was a glibc to tell.

    By default it returns every large block to the kernel and faults it in again, page by page, a microsecond each:
    30-40 % of a training step, measured.  The limit for blocks of their own is the largest that glibc takes, 32 MiB.
    """
    return _tell((_TRIM_THRESHOLD, 2**31 - 1), (_MMAP_THRESHOLD, 32 * 2**20), (_LARGEST_FAST, 0))


def share_one_heap() -> bool:
    """Tells glibc to give threads no heaps of their own from now on; True where there was a glibc to tell.

    By default each thread that comes is given one, and what it frees there no other can have.  Where whatever thread is
    free reads what another lets go of later, every heap grows to the most that was ever in it.  To be said before there
    are many threads: the first few heaps decide how many there may be, and who has one keeps it.
    """
    return _tell((_MOST_HEAPS, 1))


def _tell(*told: tuple[int, int]) -> bool:
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    said = [mallopt(option, value) for option, value in told]
    return all(said)


def without_thread_cache(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a program that trains: its threads put no small blocks aside.

    glibc reads this when a program starts, and not later; `keep_freed_memory` tells it the rest.  What was asked for
    there stands; elsewhere than with glibc nothing is changed.
    """
    told = environment.get(_TUNABLES, "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc.tcache_count" in told:
        return dict(environment)
    return {**environment, _TUNABLES: ":".join(filter(None, (told, _NO_THREAD_CACHE)))}


def begin_anew() -> None:
    """This program in the place of itself, with that environment; returns where it has it already.

    To be called first thing in a program: what it did before is done again.
    """
    environment = without_thread_cache(os.environ)
    if environment != dict(os.environ) and sys.executable:
        with suppress(OSError):  # then it runs as it is, and takes more memory
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
