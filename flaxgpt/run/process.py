"""What a script sets up for its own process: what becomes of memory that is freed, and of compiled programs at the next start."""

from __future__ import annotations

import ctypes
import os
import warnings

from flaxgpt.data.corpora import cache_dir

PROGRAMS_BYTES = 2 * 1024**3
"""What compiled programs may take on disk; the least recently used go first. An update of GPT-2 124M on a CPU is 2 MB."""

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8


def keep_memory_and_programs() -> None:
    """Call it first in a script that computes with JAX: what it sets is read when JAX is imported."""
    _keep_freed_memory()
    _keep_compiled_programs()


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 2 GB, where by default it gives pieces of over 128 KB to 32 MB back to the system.

    XLA on a CPU allocates an update's scratch memory anew each time, and the kernel then hands out zeroed pages, 4 KB at a time:
    more than a third of an update of `shakespeare-char` (docs/performance.md). One arena, since threads that have their own don't
    use what others have freed. Pieces of 1 GB or more still come and go, so that no hole of that size is left behind.
    """
    _set_malloc({M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 2**30, M_TRIM_THRESHOLD: 2**31 - 1})


def give_freed_memory_back() -> None:
    """Have glibc give pieces of over 1 MB back to the system at once, for a script that holds large arrays one after the other.

    By itself it keeps pieces of up to 32 MB: one copy more of GPT-2 124M, while a port of it is checked (docs/port.md).
    """
    _set_malloc({M_MMAP_THRESHOLD: 10**6})


def _set_malloc(values: dict[int, int]) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:  # glibc; other libraries have other habits
        for parameter, value in values.items():
            mallopt(parameter, value)


def _keep_compiled_programs() -> None:
    """Have JAX keep them in the cache folder, unless the environment says where, or that folder can't be written."""
    folder = cache_dir() / "programs"
    exists = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # a full disk: it is compiled again, no more
    if os.access(exists, os.W_OK) and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(PROGRAMS_BYTES))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
