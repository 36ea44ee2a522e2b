"""Finds, while a model runs, which layers take the very output of which others.

No module is judged by its name or its place: one run is watched, its operations below autograd. The
output of a layer is followed by the identity of tensors through what leaves its values as they are
(copies, identities, dropout in eval), until something takes it.
"""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmbcn.layers.one_run import SAME_VALUES, Origins

KEPT = "the model's output, or what the model keeps"


class Flow(TorchDispatchMode):
    """While entered, records what goes into the layers and who takes what comes out.

    Args:
        layers: those to watch, in eval mode; none lies inside of another.

    Attributes:
        sources: of each layer that ran, in the order of first calls, where its inputs come from:
            layers whose very output they are, None for anything else.
        takers: of each layer that ran, what took its output: layers, and names of operations.
        dims: of each layer that ran, the dimensions of its inputs.
        dtypes: of each layer that ran, the dtype of its latest input.
        recast: layers whose output has another dtype than their input.
        bare: layers whose parameters or buffers something else uses.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.sources: dict[nn.Module, set[nn.Module | None]] = {}
        self.takers: dict[nn.Module, set[nn.Module | str]] = {}
        self.dims: dict[nn.Module, set[int]] = {}
        self.dtypes: dict[nn.Module, torch.dtype] = {}
        self.recast: set[nn.Module] = set()
        self.bare: set[nn.Module] = set()
        self._layers = list(layers)
        self._owners: dict[int, list[nn.Module]] = {}
        for layer in self._layers:
            for tensor in chain(layer.parameters(), layer.buffers()):
                self._owners.setdefault(id(tensor), []).append(layer)
        self._origins: Origins[nn.Module] = Origins()
        self._inside = 0

    def __enter__(self) -> "Flow":
        self._handles = []
        for layer in self._layers:
            self._handles += [
                layer.register_forward_pre_hook(self._begin, with_kwargs=True),
                layer.register_forward_hook(self._end, with_kwargs=True),
            ]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for handle in self._handles:
            handle.remove()
        self._origins.clear()

    def finish(self) -> None:
        """Note what is kept beyond the run: call while nothing but the outputs is held."""
        for origin in self._origins.alive():
            self.takers[origin].add(KEPT)

    def _take(self, value: Any, taker: nn.Module | str) -> nn.Module | None:
        origin = self._origins.of(value)
        if origin is not None:
            self.takers[origin].add(taker)
        return origin

    def _begin(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        values = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        self.takers.setdefault(layer, set())
        self.sources.setdefault(layer, set()).update(self._take(v, layer) for v in values)
        self.dims.setdefault(layer, set()).update(v.dim() for v in values)
        self.dtypes.update((layer, v.dtype) for v in values)
        self._inside += 1

    def _end(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._inside -= 1
        if isinstance(output, Tensor):
            self._origins.note(output, layer)
            if output.dtype != self.dtypes.get(layer):
                self.recast.add(layer)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self._inside:
            return result
        for value in tree_leaves((args, kwargs)):
            self.bare.update(self._owners.get(id(value), ()))
            origin = self._origins.of(value)
            if origin is None:
                continue
            if func.overloadpacket in SAME_VALUES and _alike(value, result):
                self._origins.note(result, origin)
            else:
                self.takers[origin].add(func.overloadpacket.__name__.strip("_"))
        if func._schema.is_mutable:
            for leaf in tree_leaves(result):
                self._origins.forget(leaf)
        return result


def _alike(value: Tensor, result: Any) -> bool:
    return (
        isinstance(result, Tensor) and result.shape == value.shape and result.dtype == value.dtype
    )
