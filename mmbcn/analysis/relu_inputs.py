"""Finds, while a model runs, which norm layer's output each ReLU takes.

No module is judged by its name or its place: the operations themselves are watched, below autograd,
where ``nn.ReLU``, ``F.relu``, ``x.relu_()`` and ``x.clamp(min=0)`` are alike. The output of a norm
is followed by identity through what leaves its values as they are (casts, copies, identity
layers), until something takes it. So any model that runs can be watched, with control flow, layers
that run several times and layers that never run.

A norm is *followed by a ReLU* where the ReLU takes its very output, or gives it (timm's
``BatchNormAct2d``, which ends in one). In a residual block, norm -> add -> ReLU is not: there the
ReLU's input is the sum with the shortcut, which no norm has normalized. Leaky and smooth
activations are no ReLUs: no unit is eliminated in them. Nor is what lies between norm and ReLU in
other shapes or values, such as a pooling, a dropout in training or a permutation of the axes.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmbcn.layers import FrozenBN
from mmbcn.layers.foreign import is_frozen
from mmbcn.layers.one_run import SAME_VALUES, Origins

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, FrozenBN)
_aten = torch.ops.aten
_CLAMPS = (_aten.clamp, _aten.clamp_, _aten.clamp_min, _aten.clamp_min_)
_CLAMPS += (_aten.hardtanh, _aten.hardtanh_)  # of ReLU6
_THRESHOLDS = (_aten.threshold, _aten.threshold_)


def find_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The norm layers with their names; of a batch-channel norm the whole, not its batch stage.

    A layer that stands in several places comes once, by the first of its names.
    """
    seen = set()

    def find(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, _NORMS) or is_frozen(module):
            yield name or type(module).__name__, module
        else:
            for key, child in module.named_children():
                yield from find(child, f"{name}.{key}" if name else key)

    return find(model, "")


class ReluInputs(TorchDispatchMode):
    """While entered, calls ``observe(name, layer, x)`` for each ReLU's input that a norm has made.

    Right before the ReLU runs, as it may overwrite ``x``; of a norm that ends in a ReLU, when the
    norm has run. Several models, or parts of one, are watched by one object each.

    Args:
        model: it may be in training, under autograd, autocast, or without gradients.
        observe: must not change ``x``.

    Attributes:
        followers: of each norm that ran, what took its output: ``"relu"``, or the names of other
            operations, as ``"add"`` and ``"convolution"``.
    """

    def __init__(self, model: nn.Module, observe: Callable[[str, nn.Module, Tensor], None]) -> None:
        super().__init__()
        self.followers: dict[str, set[str]] = {}
        self._norms = dict(find_norms(model))
        self._observe = observe
        self._outputs: Origins[str] = Origins()  # the norms that made these tensors
        self._running: list[str] = []  # norms, from the outermost to the innermost
        self._rectified: Origins[Tensor] = (
            Origins()
        )  # a ReLU's output inside of a norm -> its input
        self._observing = False

    def __enter__(self) -> "ReluInputs":
        self._handles = []
        for name, norm in self._norms.items():
            self._handles += [
                norm.register_forward_pre_hook(partial(self._begin, name)),
                norm.register_forward_hook(partial(self._end, name)),
            ]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for handle in self._handles:
            handle.remove()
        self._outputs.clear()
        self._rectified.clear()
        self._running.clear()

    def _begin(self, name: str, *_: Any) -> None:
        self._running.append(name)
        self.followers.setdefault(name, set())

    def _end(self, name: str, _: nn.Module, __: Any, output: Any) -> None:
        self._running.pop()
        if not isinstance(output, Tensor):
            return
        before = self._rectified.of(output)
        if before is None:
            self._outputs.note(output, name)
        else:
            self._see(name, before)
        if not self._running:
            self._rectified.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._observing:
            return func(*args, **kwargs)
        taken = [a for a in tree_leaves((args, kwargs)) if self._outputs.of(a)]
        op, inside = func.overloadpacket, None
        if _is_relu(op, args, kwargs):
            name = self._outputs.of(args[0])
            if name is not None:
                self._see(name, args[0])
            elif self._running:
                inside = args[0].clone() if func._schema.is_mutable else args[0]
            taken = []
        result = func(*args, **kwargs)
        if inside is not None:
            self._rectified.note(result, inside)
        for tensor in taken:
            name = self._outputs.of(tensor)
            if op in SAME_VALUES and isinstance(result, Tensor) and result.shape == tensor.shape:
                self._outputs.note(result, name)
            else:
                self.followers[name].add(op.__name__.strip("_"))
        if func._schema.is_mutable:
            for leaf in tree_leaves(result):
                self._outputs.forget(leaf)
        return result

    def _see(self, name: str, x: Tensor) -> None:
        self.followers[name].add("relu")
        self._observing = True
        try:
            with torch.no_grad():
                self._observe(name, self._norms[name], x)
        finally:
            self._observing = False


def _is_relu(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if op in (_aten.relu, _aten.relu_):
        return True
    if op in _THRESHOLDS:
        return tuple(args[1:3]) == (0, 0)
    if op not in _CLAMPS:
        return False
    low, high = (*args[1:3], None, None)[:2]
    low = kwargs.get("min", low)
    high = kwargs.get("max", high)
    return isinstance(low, (int, float)) and low == 0 and (high is None or high > 0)
