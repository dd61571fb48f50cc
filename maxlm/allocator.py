"""How glibc gives out the memory that programs for CPUs work in. Elsewhere these do nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_SET_THP_DISABLE = 41  # of prctl(2)
_ARRAY = 2**17  # bytes; the blocks that XLA's products copy their operands to are of 2**19 and more


def use_huge_pages() -> None:
    """Starts this program again with glibc's huge pages on, before JAX is there, unless they are on already.

    XLA's CPU programs allocate their temporaries anew each step. With small pages a step of the bench's size takes
    300 thousand page faults, a sixth of its time. glibc reads the setting when a process starts, and at no other time.
    """
    setting, tunables = "glibc.malloc.hugetlb", os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or setting in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{setting}=1")))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back() -> None:
    """What was freed goes back to the system; of a compiler that are hundreds of MiB."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def give_back_at_once() -> None:
    """From here on arrays of this process go back when they are freed, so that its peak is what it needs.

    Of what several devices free, glibc keeps up to twice as much as they need at once for their next step. That makes
    steps a tenth shorter, and is what a run does.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.prctl(_SET_THP_DISABLE, 1, 0, 0, 0)  # neighbours would be held in pages of 2 MiB, used or not
        library.mallopt(_MMAP_THRESHOLD, _ARRAY)
        library.mallopt(_TRIM_THRESHOLD, _ARRAY)
