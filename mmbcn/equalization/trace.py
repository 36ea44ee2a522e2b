"""Follows the scale of every channel through one run of a network.

Each channel of each tensor has a scale that it may be multiplied by if the layers around make up
for it. A layer gives its outputs new ones. Positively homogeneous operations hand them on (ReLU,
pooling, interpolation, ...), additions need equal ones (residual streams), concatenation appends
them. Inputs, outputs, and all that an operation not known here touches, have the scale 1: so
whatever is left free can be scaled, and the function stays the same.

Seen are the elementary operations (``aten``) of a run, not modules: control flow, functional calls
and recomputation make no difference.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmbcn.equalization.rules import Rules
from mmbcn.layers import FrozenBN
from mmbcn.layers.foreign import is_frozen

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, FrozenBN)
_NORM_OPS = ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm")


class Trace(TorchDispatchMode):
    """Records layers, biases and scales while it is active; see `follow`.

    Args:
        model: the network that is going to run.
        ignore_norms: treat normalization layers as if they were not there.

    Attributes:
        rules: with the layers and biases found, and their scales.
        norms: normalization layers in the way of scales.
        walls: what else is in the way, with where it is.
        idle: the names of parameters that nothing used.
    """

    def __init__(self, model: nn.Module, ignore_norms: bool) -> None:
        super().__init__()
        self.rules = Rules(model.parameters())
        self.norms: list[str] = []
        self.walls: list[str] = []
        self.idle: list[str] = []
        self._model = model
        self._ignore_norms = ignore_norms
        self._alive: list[Any] = []  # so that no id is used twice
        self._inside: list[str] = []  # modules
        self._norms_inside = 0
        self._unused = {id(parameter): name for name, parameter in model.named_parameters()}

    def follow(self, run: Callable[[], Any]) -> None:
        """Run the network and record it; what ``run`` returns keeps its scale."""
        handles = []
        for name, module in self._model.named_modules():
            title = f"{name} ({type(module).__name__})" if name else type(module).__name__
            handles += self._watch(module, title)
        try:
            with self:
                outputs = run()
        finally:
            for handle in handles:
                handle.remove()
        for output in tree_leaves(outputs):
            self.rules.fix(output)
        self.rules.finish()
        self.idle = list(self._unused.values())

    def _watch(self, module: nn.Module, title: str) -> list[Any]:
        norm = isinstance(module, _NORMS) or is_frozen(module)
        leaf = norm or not list(module.children())

        def enter(*_: Any) -> None:
            self._inside.append(title)
            self._norms_inside += norm
            if leaf:  # kernels that are no operations of PyTorch take parameters unseen
                self._use(module.parameters())

        def leave(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._norms_inside -= norm
            if norm and not self._norms_inside:
                self._normalized((*args, *kwargs.values()), output)
            self._inside.pop()

        return [
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave, with_kwargs=True),
        ]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._use(tree_leaves((args, kwargs)))
        if not self._norms_inside:
            self._alive.append((args, kwargs, out))
            self._record(func, args, kwargs, out)
        return out

    def _use(self, values: Iterable[Any]) -> None:
        for value in values:
            self._unused.pop(id(value), None)

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func._schema.name.removeprefix("aten::").removesuffix("_")
        if any(word in name for word in _NORM_OPS):
            self._normalized(args, out[0] if isinstance(out, tuple) else out)
        elif not self.rules.record(name, func._schema.is_mutable, args, kwargs, out):
            self._stop(name, (args, kwargs), self.walls)

    def _normalized(self, inputs: Any, output: Any) -> None:
        self._alive.append(output)
        if not (self._ignore_norms and self.rules.hand_on(inputs[0], output)):
            self._stop("", inputs, self.norms)

    def _stop(self, name: str, values: Any, places: list[str]) -> None:
        """Fix the scales of all that goes into an operation, and remember where."""
        stopped = [self.rules.fix(value) for value in tree_leaves(values)]
        place = " in ".join(filter(None, [name, *(self._inside[-1:] or ["the model"])]))
        if any(stopped) and place not in places:
            places.append(place)
