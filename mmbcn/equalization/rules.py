"""How operations hand the scales of channels on, and which layers give new ones."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmbcn.equalization.layers import Layer
from mmbcn.equalization.scales import ScaleNames, Scales, fixed

# f(a x) = a f(x) for a > 0, channel by channel
_HOMOGENEOUS = {
    *("relu", "leaky_relu", "_prelu_kernel", "abs", "neg", "native_dropout"),
    *("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("reflection_pad2d", "replication_pad2d"),
    *("clone", "detach", "alias", "_to_copy"),
}
_OVER_DIMS = {"mean", "sum", "amax"}
_VIEWS = {"view", "_unsafe_view", "detach", "alias", "unsqueeze"}  # keep the order of values


class Rules:
    """The scales of tensors, and the rules by which operations hand them on.

    Tensors are known by their ids: whoever records has to keep them alive.

    Args:
        parameters: those of the network.

    Attributes:
        layers: by their weights.
        biases: by their parameters.
        names: the scales.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.layers: dict[nn.Parameter, Layer] = {}
        self.biases: dict[nn.Parameter, Layer] = {}
        self.names = ScaleNames()
        self._scales: dict[int, Scales] = {}
        self._parameters = {id(p): (p, False) for p in parameters}  # and whether transposed
        self._scaled: set[nn.Parameter] = set()  # by the operation at hand
        self._misused: set[nn.Parameter] = set()  # by operations that know no scales

    def record(self, name: str, mutates: bool, args: Any, kwargs: Any, out: Any) -> bool:
        """Give the output of an operation its scales; False: its inputs must not be scaled."""
        if args and id(args[0]) in self._parameters and name in (*_VIEWS, "t"):
            parameter, turned = self._parameters[id(args[0])]
            self._parameters[id(out)] = parameter, turned != (name == "t")
            return True
        self._scaled.clear()
        scales = self._handed_on(name, args, kwargs, out)
        leaves = tree_leaves((args, kwargs))
        used = {self._parameters[id(leaf)][0] for leaf in leaves if id(leaf) in self._parameters}
        self._misused |= used if scales is None else used - self._scaled
        if scales is None:
            return False
        outs, each = (out, scales) if isinstance(scales, list) else ([out], [scales])
        for tensor, own in zip(outs, each, strict=True):
            if mutates:  # a view, perhaps
                self.names.join(self._of(tensor), own)
            self._scales[id(tensor)] = own
        return True

    def hand_on(self, x: Tensor, out: Tensor) -> bool:
        """Give ``out`` the scales of ``x``; False: their channels differ."""
        scales = self._kept(x, out)
        if scales is not None:
            self._scales[id(out)] = scales
        return scales is not None

    def fix(self, x: Any) -> bool:
        """Fix the scales of a tensor at 1; whether any was free."""
        free = self._is_scaled(x)
        if free:
            self.names.fix(self._scales[id(x)])
        return free

    def finish(self) -> None:
        """Fix what belongs to parameters with a second use, and give equal scales one name."""
        layers = [*self.layers.values(), *self.biases.values()]
        misused = self._misused | (self.layers.keys() & self.biases.keys())
        for layer in layers:
            if layer.weight in misused:
                self.names.fix(layer.ins)
                self.names.fix(layer.outs)
        for layer in layers:
            layer.ins, layer.outs = self.names.find(layer.ins), self.names.find(layer.outs)

    def _handed_on(self, name: str, args: Any, kwargs: Any, out: Any) -> Any:
        """The scales of the output, a list of them for several; None: the operation is a wall."""
        value = next(iter(tree_leaves(out)), None)
        if not isinstance(value, Tensor) or not value.is_floating_point() or "out" in kwargs:
            return None
        if "2d" in name and args[0].dim() != 4:  # channels would be rows
            return None
        if name in _HOMOGENEOUS and isinstance(out, tuple):  # with indices, or a mask
            scales = self._kept(args[0], out[0])
            return None if scales is None else [scales, fixed(1)]
        if name in _HOMOGENEOUS:
            return self._kept(args[0], out)
        kind = "over_dims" if name in _OVER_DIMS else name.lstrip("_")
        handler = getattr(self, f"_{kind}_op", None)
        return handler(out, *args, **kwargs) if handler else None

    # --- operations: their output, then their arguments --------------------------------------

    def _convolution_op(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Any, *rest: Any
    ) -> Scales | None:
        transposed, groups = rest[3], rest[5]
        return self._layer(x, weight, bias, groups, transposed, out.shape[1], turned=False)

    def _addmm_op(
        self,
        out: Tensor,
        bias: Tensor,
        x: Tensor,
        weight: Tensor,
        beta: float = 1,
        alpha: float = 1,
    ) -> Scales | None:
        return self._layer(x, weight, bias, 1, False, out.shape[1], turned=True)

    def _mm_op(self, out: Tensor, x: Tensor, weight: Tensor) -> Scales | None:
        return self._layer(x, weight, None, 1, False, out.shape[1], turned=True)

    def _add_op(self, out: Tensor, x: Any, y: Any, alpha: float = 1) -> Scales | None:
        for one, other in ((x, y), (y, x)):
            if self._per_channel(other, one, out):
                scales = self._of_result(one, out)
                return scales if self._add_bias(other, scales) else None
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return None
        scales = self._of_result(x, out)
        self.names.join(scales, self._of_result(y, out))
        return scales

    _sub_op = _add_op

    def _mul_op(self, out: Tensor, x: Any, y: Any) -> Scales | None:
        for one, other in ((x, y), (y, x)):
            if self._per_channel(other, one, out):
                return self._layer(one, other, None, out.shape[1], False, out.shape[1], False)
        return self._product(out, x, y)

    def _div_op(self, out: Tensor, x: Any, y: Any, **kwargs: Any) -> Scales | None:
        return None if self._is_scaled(y) or kwargs else self._product(out, x, y)

    def _cat_op(self, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Scales | None:
        each = [self._of(tensor) for tensor in tensors]
        if dim % out.dim() == 1:
            return np.concatenate(each)
        for other in each[1:]:
            self.names.join(each[0], other)
        return each[0]

    def _constant_pad_nd_op(
        self, out: Tensor, x: Tensor, pad: Sequence[int], value: float = 0
    ) -> Scales | None:
        rest = x.dim() - 2  # dimensions behind the channels; the last is the first in pad
        same = value == 0 and not any(pad[2 * rest : 2 * rest + 2])
        return self._kept(x, out) if same else None

    def _over_dims_op(
        self, out: Tensor, x: Tensor, dim: Any = None, *args: Any, **kwargs: Any
    ) -> Scales | None:
        dims = [dim] if isinstance(dim, int) else dim or [0]
        return self._kept(x, out) if all(d % x.dim() > 1 for d in dims) else None

    def _view_op(self, out: Tensor, x: Tensor, size: Any) -> Scales | None:
        if out.dtype != x.dtype:  # other numbers of the same bits
            return None
        if out.dim() == 2 and x.dim() > 2 and out.shape[0] == x.shape[0]:
            return np.repeat(self._of(x), x.shape[2:].numel())
        return self._kept(x, out)

    _unsafe_view_op = _view_op

    def _expand_op(self, out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Scales | None:
        return self._of_result(x, out) if x.dim() == out.dim() else None

    def _unsqueeze_op(self, out: Tensor, x: Tensor, dim: int) -> Scales | None:
        return self._kept(x, out) if dim % out.dim() > 1 else None

    def _squeeze_op(self, out: Tensor, x: Tensor, dim: Any = (0,)) -> Scales | None:
        dims = [dim] if isinstance(dim, int) else dim
        return self._kept(x, out) if all(d % x.dim() > 1 for d in dims) else None

    def _slice_op(
        self,
        out: Tensor,
        x: Tensor,
        dim: int = 0,
        start: Any = None,
        end: Any = None,
        step: int = 1,
    ) -> Scales | None:
        return self._of(x)[start:end:step] if dim % x.dim() == 1 else self._of(x)

    def _select_op(self, out: Tensor, x: Tensor, dim: int, index: int) -> Scales | None:
        return self._kept(x, out) if dim % x.dim() > 1 else None

    def _split_op(self, out: Any, x: Tensor, size: Any, dim: int = 0) -> list[Scales]:
        if dim % x.dim() != 1:
            return [self._of(x) for _ in out]
        return np.split(self._of(x), np.cumsum([part.shape[1] for part in out])[:-1])

    _split_with_sizes_op = _split_op

    # --- what they share ---------------------------------------------------------------------

    def _layer(
        self,
        x: Tensor,
        weight: Any,
        bias: Any,
        groups: int,
        transposed: bool,
        channels: int,
        turned: bool,
    ) -> Scales | None:
        """The scales that a layer gives its outputs; None: its weight cannot be scaled."""
        parameter, is_turned = self._parameters.get(id(weight), (None, False))
        if parameter is None or is_turned != turned or not parameter.requires_grad:
            return None
        shape = weight.shape[::-1] if turned else weight.shape
        if shape[:2] != parameter.shape[:2] and groups != parameter.numel():  # another form
            return None
        ins = self._of(x)
        layer = Layer(parameter, groups, transposed, ins, self.names.new(channels))
        known = self.layers.setdefault(parameter, layer)
        if known is not layer:  # used again
            if (known.groups, known.transposed) != (groups, transposed):
                return None
            self.names.join(known.ins, ins)
        self._scaled.add(parameter)
        if bias is not None and not self._add_bias(bias, known.outs):
            self.names.fix(known.outs)
        return known.outs

    def _add_bias(self, bias: Tensor, outs: Scales) -> bool:
        parameter, _ = self._parameters.get(id(bias), (None, False))
        if parameter is None or not parameter.requires_grad:
            return False
        own = Layer(parameter, len(outs), False, fixed(len(outs)), outs)
        known = self.biases.setdefault(parameter, own)
        self.names.join(known.outs, outs)
        self._scaled.add(parameter)
        return True

    def _product(self, out: Tensor, x: Any, y: Any) -> Scales | None:
        one, other = (self._of_result(v, out) for v in (x, y))
        if self.names.is_fixed(other).all():
            return one
        return other if self.names.is_fixed(one).all() else None

    def _per_channel(self, value: Any, operand: Any, out: Tensor) -> bool:
        """Whether a value is a parameter of one number for each channel of the other operand."""
        if id(value) not in self._parameters or id(operand) in self._parameters:
            return False
        if not isinstance(operand, Tensor) or operand.shape != out.shape or out.dim() < 2:
            return False
        shape = (1,) * (out.dim() - value.dim()) + tuple(value.shape)
        return 1 < shape[1] == value.numel() == out.shape[1]

    def _of(self, x: Tensor) -> Scales:
        """The scales of a tensor's channels; what has none by name is a constant."""
        return self._scales.get(id(x), fixed(x.shape[1] if x.dim() > 1 else 1))

    def _of_result(self, x: Any, out: Tensor) -> Scales:
        """The scales that an operand brings to each channel of the result."""
        own = self._scales.get(id(x)) if isinstance(x, Tensor) else None
        channels = out.shape[1] if out.dim() > 1 else 1
        if own is None:
            return fixed(channels)
        if x.dim() != out.dim():
            self.names.fix(own)
            return fixed(channels)
        return np.broadcast_to(own, channels)

    def _kept(self, x: Tensor, out: Tensor) -> Scales | None:
        return self._of(x) if x.dim() > 1 and x.shape[:2] == out.shape[:2] else None

    def _is_scaled(self, value: Any) -> bool:
        own = self._scales.get(id(value)) if isinstance(value, Tensor) else None
        return own is not None and not self.names.is_fixed(own).all()
