"""Launching Triton kernels, at little cost to the host.

Triton's own launcher looks at every argument of every call, and a network of small tensors waits
for the host. No autotuning: crops vary in size, and a tuner would time each size anew.
"""

from collections.abc import Callable
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch
import triton
from torch import Tensor

_REUSABLE = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)


class Launch:
    """A kernel with its grid, sizes and constants, to be called with tensors many times.

    Besides those, the compiled kernel depends on dtypes and alignment of the tensors only. It is
    found by the dtypes where all tensors are aligned, and by Triton itself otherwise.

    Args:
        kernel: a function under ``triton.jit``: tensors, numbers, sizes, constants.
        programs: size of the grid.
        sizes: its integers.
        constants: its ``tl.constexpr`` arguments.
    """

    def __init__(
        self, kernel: Any, programs: int, sizes: tuple[int, ...], **constants: Any
    ) -> None:
        self._kernel = kernel
        self._grid = programs, 1, 1
        self._sizes = sizes
        self._constants = constants
        named = (name for name in kernel.arg_names if name in constants)
        self._last = *sizes, *(constants[name] for name in named)
        self._compiled: dict[tuple[torch.dtype, ...], Callable[..., None]] = {}

    def __call__(self, *tensors: Tensor, numbers: tuple[float, ...] = ()) -> None:
        """Run on the tensors' device and its current stream."""
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*tensors, numbers=numbers)
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = device, *[tensor.dtype for tensor in tensors]
        aligned = not reduce(or_, pointers) & 15
        run = self._compiled.get(key) if aligned else None
        if run is not None:
            return run(*pointers, *numbers, *self._last)
        compiled = self._kernel[self._grid](*tensors, *numbers, *self._sizes, **self._constants)
        if _REUSABLE and aligned and compiled is not None:  # the interpreter returns nothing
            self._compiled[key] = compiled[self._grid]
        return None


def power_of_2(size: int, most: int | None = None) -> int:
    """The smallest power of two that holds ``size``, at most ``most``."""
    power = 1 << max(size - 1, 0).bit_length()
    return power if most is None else min(power, most)


def blocks(size: int, block: int) -> int:
    """How many blocks hold ``size``."""
    return -(-size // block)


def programs_wanted(device: torch.device) -> int:
    """How many programs fill a device."""
    return 8 * _processors(device)


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
