"""Memory for outputs on CPUs, which is often the larger part of a normalization's time.

glibc maps allocations above 32 MiB anew on every call, and smaller ones whenever its heap has been
trimmed; the kernel then zeroes them page by page at the first touch: four times what writing the
values costs. In huge pages (2 MiB) most of that goes. They are asked for as programs on Linux may
(``madvise``), where the system allows it.
"""

import ctypes
import mmap
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes: two huge pages, of which one at least is whole


def empty_like(x: Tensor) -> Tensor:
    """``torch.empty_like``, large ones in huge pages."""
    y = torch.empty_like(x)
    if y.is_cpu and y.nbytes >= _LARGE and (madvise := _madvise()):
        first = -(-y.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        madvise(first, y.data_ptr() + y.nbytes - first, mmap.MADV_HUGEPAGE)  # refusal: as before
    return y


@lru_cache
def _madvise() -> Any:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
