"""One run of a model that shows how its layers are joined: its input, and which tensor is which.

For tracers that watch operations below autograd, where a tensor is known by its identity alone.
"""

import weakref
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

_SIZE = 64  # of the image
_aten = torch.ops.aten
# operations that leave the values as they are, if the shape stays
SAME_VALUES = {
    *(_aten.alias, _aten.detach, _aten.clone, _aten._to_copy, _aten.view, _aten._unsafe_view),
}

T = TypeVar("T")


class Origins(Generic[T]):
    """Where tensors come from, by their identity, as long as they live."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref, T]] = {}

    def note(self, tensor: Tensor, origin: T) -> None:
        """Note where a tensor comes from."""
        self._known[id(tensor)] = weakref.ref(tensor), origin

    def of(self, value: Any) -> T | None:
        """Where it comes from; None where that is not known."""
        ref, origin = self._known.get(id(value), (None, None))
        return origin if ref is not None and ref() is value else None

    def forget(self, value: Any) -> None:
        """Know nothing of this tensor any more."""
        self._known.pop(id(value), None)

    def alive(self) -> list[T]:
        """The origins of the tensors that something still holds."""
        return [origin for ref, origin in self._known.values() if ref() is not None]

    def clear(self) -> None:
        """Know nothing any more."""
        self._known.clear()


def blank_image(model: nn.Module) -> Tensor:
    """An image of zeros of the channels, the dtype and the device that a model's first layer takes.

    Shape: (1, C, 64, 64)

    Raises:
        ValueError: the model has no 2-d convolution to tell.
    """
    convs = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv = next(convs, None)
    if conv is None:
        raise ValueError("there is no 2-d convolution")
    options = dict(device=conv.weight.device, dtype=conv.weight.dtype)
    return torch.zeros(1, conv.in_channels, _SIZE, _SIZE, **options)


def run_all(model: nn.Module, *inputs: Any) -> list[Any]:
    """Run a model; of mmseg's, the auxiliary heads too, which run in training only.

    Returns:
        The model's output, and each auxiliary head's.
    """
    outputs = [model(*inputs)]
    heads = getattr(model, "auxiliary_head", None)
    if heads is not None and hasattr(model, "extract_feat"):
        features = model.extract_feat(*inputs)
        heads = heads if isinstance(heads, nn.ModuleList) else [heads]
        outputs += [head(features) for head in heads]
    return outputs
