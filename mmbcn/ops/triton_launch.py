"""Launching Triton kernels: on the tensor's device, with block sizes from heuristics.

No autotuning: crops vary in size, and a tuner would time each size anew.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor


def launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run ``programs`` programs of a kernel on x's device and its current stream.

    Args:
        kernel: a function under ``triton.jit``.
        programs: size of the grid.
        x: says on which device; not passed on.
        arguments: tensors and numbers for the kernel.
        constants: its ``tl.constexpr`` arguments and launch options.
    """
    with torch.cuda.device_of(x):  # does nothing for a tensor on the CPU
        kernel[(programs,)](*arguments, **constants)


def block(size: int, most: int) -> int:
    """A power of two that holds ``size``, between 16 and ``most``."""
    return max(16, min(triton.next_power_of_2(size), most))


def programs_wanted(x: Tensor) -> int:
    """How many programs fill x's device."""
    return 8 * _processors(x.device)


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # interpreted
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
