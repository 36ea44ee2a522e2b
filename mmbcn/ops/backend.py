"""Which implementation computes: chosen by device and size, or by ``MMBCN_BACKEND``."""

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor, nn

from mmbcn.errors import UsageError

BACKENDS = ("auto", "aten", "triton", "reference")
# values below which the plain code is faster, by the arithmetic on rows
_SMALL_ON_CPU, _SMALL = 1 << 18, 1 << 14
_TRITON = (3, 0)  # the oldest version
_CAPABILITY = (8, 0)  # of the oldest GPU that the kernels are for


def backend_for(x: Tensor) -> str:
    """The backend that computes on ``x``: 'aten', 'triton' or 'reference'.

    The environment variable ``MMBCN_BACKEND`` overrides the choice (default: auto).

    Raises:
        UsageError: ``MMBCN_BACKEND`` is none of `BACKENDS`, or not possible here.
    """
    if torch.compiler.is_compiling():  # plain expressions, which the compiler fuses on any device
        return "aten"
    wanted = _wanted(x)
    if wanted != "auto":
        return wanted
    if torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
        return "reference"  # a trace, a fake or distributed tensor: its values are not to be read
    if _prefers_triton(x):
        return "triton"
    return "reference" if x.numel() < (_SMALL_ON_CPU if x.is_cpu else _SMALL) else "aten"


def implementation(x: Tensor) -> ModuleType | None:
    """The module of the passes over x that are fused; None: the reference computes."""
    backend = backend_for(x)
    if backend == "reference":
        return None
    if backend == "triton":
        from mmbcn.ops import triton_passes

        return triton_passes
    from mmbcn.ops import aten

    return aten


def has_kernels(statistics: Tensor) -> bool:
    """Whether Triton computes on statistics of rows or channels, however few they are."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    wanted = _wanted(statistics)
    return wanted == "triton" or (wanted == "auto" and _prefers_triton(statistics))


def autocast_off(x: Tensor) -> AbstractContextManager[None]:
    """Autocast would lower, or copy, what is in the right dtype already."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _wanted(x: Tensor) -> str:
    wanted = os.environ.get("MMBCN_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise UsageError(f"MMBCN_BACKEND is {wanted!r}; known: {', '.join(BACKENDS)}")
    if wanted == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if not _has_triton() or not (x.is_cuda or interpreted):
            raise UsageError(
                f"MMBCN_BACKEND is 'triton', which needs the package triton, version 3.0 or later, "
                f"and a CUDA tensor; got one on {x.device}. Unset MMBCN_BACKEND, or set "
                f"TRITON_INTERPRET=1 to interpret the kernels on any device (slow, for tests)"
            )
    return wanted


def _prefers_triton(x: Tensor) -> bool:
    # in a trace, or of a subclass (fake, distributed), a kernel would see no values
    plain = type(x) in (Tensor, nn.Parameter) and not torch.jit.is_tracing()
    return x.is_cuda and plain and _has_triton() and _compiles_for(x.device)


@lru_cache
def _has_triton() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= _TRITON


@lru_cache
def _compiles_for(device: torch.device) -> bool:
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    from triton.runtime import driver

    try:
        driver.active.get_current_device()  # builds its part in C on the first use
    except Exception as error:
        warnings.warn(
            f"Triton does not work here ({error}): mmbcn computes in plain operations, slower. "
            f"It needs a C compiler; MMBCN_BACKEND=aten silences this",
            stacklevel=2,
        )
        return False
    return True
