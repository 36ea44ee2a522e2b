"""Which implementation computes: chosen by device and size, or by ``MMBCN_BACKEND``."""

import os
from types import ModuleType

import torch
from torch import Tensor, nn

from mmbcn.errors import UsageError
from mmbcn.ops import aten

BACKENDS = ("auto", "aten", "triton", "reference")
_SMALL = 1 << 14  # below, the arithmetic on rows costs more than the passes over x


def backend_for(x: Tensor) -> str:
    """The backend that computes on ``x``: 'aten', 'triton' or 'reference'.

    The environment variable ``MMBCN_BACKEND`` overrides the choice (default: auto).

    Raises:
        UsageError: ``MMBCN_BACKEND`` is none of `BACKENDS`, or not possible here.
    """
    if torch.compiler.is_compiling():  # plain expressions, which the compiler fuses on any device
        return "aten"
    wanted = os.environ.get("MMBCN_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise UsageError(f"MMBCN_BACKEND is {wanted!r}; known: {', '.join(BACKENDS)}")
    if wanted != "auto":
        return wanted
    if x.numel() < _SMALL or torch._C._are_functorch_transforms_active():
        return "reference"
    if torch.jit.is_tracing() or type(x) not in (Tensor, nn.Parameter):
        return "reference"  # a trace, a fake or distributed tensor: its values are not to be read
    return "aten"


def passes(x: Tensor) -> ModuleType:
    """The module whose passes over x the fused form uses."""
    return aten
