"""Finds what the layers of Kalman normalization in a model are linked to.

A layer's prediction needs to know which norms its input comes from, and through which convolution.
No module is judged by its name or its place: the model runs once, on one small image of zeros, and
the operations themselves are watched, below autograd. The outputs of norms are followed by the
identity of tensors through ReLU, additions, concatenations, padding and convolutions, into
`Expression`s. So mm's and torchvision's networks, and whatever else is built of these, are linked
by the same code, before the optimizer is built and before the model is wrapped for several ranks.
A table of rules per kind of module would have to be written anew for each kind of block.

Followed as if they changed nothing: casts, copies, strided slices, max and average pooling,
resizing, and spatial padding. (Pooling a map of independent values would say little about pooling
one of neighbours that are alike: the statistics pass, as in the authors' code.) Not followed, so
that the layer behind is a BatchNorm, and reported: other activations, multiplications, global and
adaptive pooling, transposed and functional convolutions, and norms of other kinds.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmbcn.layers.kn import KN, HeldLinks
from mmbcn.layers.one_run import SAME_VALUES, Origins, blank_image, run_all
from mmbcn.layers.predictions import (
    Concatenated,
    Convolved,
    Expression,
    Normalized,
    Padded,
    Rectified,
    Sum,
)

_IMAGE = "the image"
_aten = torch.ops.aten
_UNCHANGED = {
    *SAME_VALUES,
    *(_aten.slice, _aten.max_pool2d_with_indices, _aten.avg_pool2d),
    *(_aten.upsample_bilinear2d, _aten.upsample_nearest2d, _aten.upsample_bicubic2d),
}
_ADDITIONS = {_aten.add, _aten.add_}
_RECTIFIERS = {_aten.relu, _aten.relu_}


def link_norms(model: nn.Module) -> None:
    """Link the `KN` layers of a model to their predecessors, those that are not linked yet.

    In place, and quickly; of a model of any kind that takes one batch of images, as mm's do in
    their mode ``'tensor'``. (Of mmseg's, the auxiliary heads are linked too.) What cannot be linked
    is a BatchNorm; one warning names these layers, but for those right behind the image. Parameters
    of learned transitions are created here: before the optimizer.

    Copies and pickles of the model are linked among themselves; those of a part of it, such as of
    one norm, are not linked and go without the rest. A convolution that is put in the place of one
    is followed; after other changes, `unlink_norms` first.

    Args:
        model: weights, statistics, modes and random generators stay as they are.
    """
    names = {module: name or "the norm" for name, module in model.named_modules()}
    norms = [module for module in names if isinstance(module, KN) and module.links is None]
    if not norms:
        return
    watch, failure = _Watch(model, norms), "does not run in a pass over an image"
    with _evaluating(model), watch:
        try:
            _run(model, watch)
        except Exception as error:  # whatever a model may raise on an image that is not its kind
            failure = f"does not run ({type(error).__name__}: {error})"
    links, unlinked = {}, {}
    for norm in norms:
        found = watch.inputs.get(norm, [failure])
        origin = found[0] if len(found) == 1 else "runs on several inputs"
        if isinstance(origin, Expression):
            links[norm] = origin
        elif origin != _IMAGE:
            unlinked[norm] = origin
    for norm in norms:
        try:
            norm.set_links(links)
        except ValueError as error:
            unlinked[norm] = str(error)
    model.kn_links = HeldLinks({m: m.links for m in names if isinstance(m, KN)})
    if unlinked:
        listed = "".join(f"\n  {names[norm]}: {reason}" for norm, reason in unlinked.items())
        warnings.warn(
            f"{len(unlinked)} of {len(norms)} KN layers have no predecessors to predict their "
            f"statistics from, and act as BatchNorm:{listed}",
            stacklevel=2,
        )


def unlink_norms(model: nn.Module) -> None:
    """Make the `KN` layers of a model forget their predecessors, until `link_norms`."""
    for module in model.modules():
        vars(module).pop("kn_links", None)
        if isinstance(module, KN):
            module.links = None


def describe_links(model: nn.Module) -> dict[str, str]:
    """What the statistics of each linked `KN` layer are predicted from, in names of modules.

    As ``{'layer1.0.bn1': 'layer1.0.conv1(relu(bn1))', ...}``
    """
    names = {module: name for name, module in model.named_modules()}
    norms = {n: m for m, n in names.items() if isinstance(m, KN) and m.link is not None}
    return {name: norm.link.text(names) for name, norm in norms.items()}


def _run(model: nn.Module, watch: "_Watch") -> None:
    image = blank_image(model)
    watch.track(image, _IMAGE)
    run_all(model, image)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the modes are put back.

    Not by ``eval()``, which mm's backbones use to freeze parameters.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            if isinstance(module, nn.Conv2d):
                module.train(mode)  # WSConv2d forgets what it kept


class _Watch(TorchDispatchMode):
    """While entered, follows where the inputs of the norms come from.

    Attributes:
        inputs: of each norm that ran, what it ran on: an expression, or why there is none.
    """

    def __init__(self, model: nn.Module, norms: list[KN]) -> None:
        super().__init__()
        self.inputs: dict[KN, list[Expression | str]] = {}
        self._norms = norms
        children = ((m, n, child) for m in model.modules() for n, child in m.named_children())
        self._convs = {c: (m, n) for m, n, c in children if isinstance(c, nn.Conv2d)}
        self._origins: Origins[Expression | str] = Origins()
        self._expressions: dict[tuple[Any, ...], Expression] = {}

    def __enter__(self) -> "_Watch":
        self._handles = [conv.register_forward_hook(self._after_conv) for conv in self._convs]
        for norm in self._norms:
            self._handles.append(norm.register_forward_pre_hook(self._before_norm))
            self._handles.append(norm.register_forward_hook(self._after_norm))
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        for handle in self._handles:
            handle.remove()
        self._origins.clear()

    def track(self, tensor: Tensor, origin: Expression | str) -> None:
        """Note where a tensor comes from; what is made alike, in another run too, is one object."""
        if isinstance(origin, Expression):
            origin = self._expressions.setdefault((type(origin), *vars(origin).values()), origin)
        self._origins.note(tensor, origin)

    def _after_conv(self, conv: nn.Conv2d, inputs: tuple[Any, ...], output: Tensor) -> None:
        origin = self._origins.of(inputs[0])
        if isinstance(origin, Expression):
            self.track(output, Convolved(*self._convs[conv], origin))

    def _before_norm(self, norm: KN, inputs: tuple[Any, ...]) -> None:
        origin = self._origins.of(inputs[0]) or "its input comes from elsewhere"
        found = self.inputs.setdefault(norm, [])
        if origin not in found:
            found.append(origin)

    def _after_norm(self, norm: KN, _: Any, output: Tensor) -> None:
        self.track(output, Normalized(norm))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = [v for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        origins = [self._origins.of(v) for v in operands]
        result = func(*args, **kwargs)
        if any(origins):
            origin = _follow(func.overloadpacket, args, kwargs, operands, origins, result)
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.track(leaf, origin)
        return result


def _follow(
    op: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    operands: list[Tensor],
    origins: list[Expression | str | None],
    result: Any,
) -> Expression | str:
    """Where the result of an operation comes from, if its operands come from there."""
    known = [origin for origin in origins if origin is not None]
    if all(origin == _IMAGE for origin in known):
        return _IMAGE
    broken = next((origin for origin in known if isinstance(origin, str)), None)
    if broken is not None:
        return "mixed with the image" if broken == _IMAGE else broken
    all_known = len(known) == len(operands)
    if op in _UNCHANGED and tree_leaves(result)[0].shape[:2] == operands[0].shape[:2]:
        return known[0]
    if op in _RECTIFIERS:
        return Rectified(known[0])
    if op in _ADDITIONS and all_known and len(known) == 2 and kwargs.get("alpha", 1) == 1:
        same = operands[0].shape == operands[1].shape
        return Sum(tuple(known)) if same else "behind an addition of different shapes"
    if op is _aten.cat and all_known and (*args[1:], kwargs.get("dim", 0))[0] in (1, -3):
        return Concatenated(tuple(known))
    if op is _aten.constant_pad_nd and len(operands[0].shape) == 4 and not any(args[2:]):
        pad = [*args[1], 0, 0, 0, 0, 0, 0]
        if not any(pad[6:]):
            return Padded(known[0], *pad[4:6]) if any(pad[4:6]) else known[0]
    return f"behind {op.__name__.strip('_')}"
