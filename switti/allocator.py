"""glibc's malloc: whether freed blocks are kept for the next allocation or returned to the kernel."""

import ctypes
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Tells glibc to keep large blocks for the next allocation instead of handing each one back to the kernel.

    A training step on a CPU allocates the same hundreds of blocks again and again; fetching their pages each time took
    10 to 20 % of its time. Without glibc nothing happens.
    """
    most = 2**31 - 1
    _mallopt(_MMAP_THRESHOLD, most)
    _mallopt(_TRIM_THRESHOLD, most)


def return_freed_memory() -> None:
    """The opposite: the resident size is that of the tensors from now on. For measuring it."""
    _mallopt(_MMAP_THRESHOLD, 2**16)


def _mallopt(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(option, value)
