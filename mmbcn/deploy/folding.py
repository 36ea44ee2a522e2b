"""Folds norms into the convolutions before them, for models that train no more.

In eval the batch stage of a batch-channel norm, and all of a BatchNorm, is a scale and a shift of
each channel. The convolution before gives scaled and shifted outputs at no cost:
``s (W x + b) + t = (s W) x + (s b + t)``. Of Batch-Channel Normalization the group normalization
stays, which computes its statistics anew for each image.
"""

import logging
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from mmbcn.analysis.borrowed import evaluating
from mmbcn.deploy import affine
from mmbcn.deploy.flow import Flow
from mmbcn.deploy.report import FoldReport
from mmbcn.errors import UsageError
from mmbcn.layers import unlink_norms
from mmbcn.layers.foreign import ends_in_activation, has_hooks
from mmbcn.layers.one_run import blank_image, run_all

_LOGGER = logging.getLogger(__name__)
_TINY = torch.finfo(torch.float64).tiny
_UNFIT = (
    "fold runs the model once, and it does not run on the image or inputs ({}): give others, "
    "inputs="
)
_BROKEN = (
    "the model does not run when it is folded ({}): does its code use attributes of its norms or "
    "convolutions?"
)


def fold(model: nn.Module, inputs: Tensor | tuple[Any, ...] | None = None) -> nn.Module:
    """Fold the norms of a model into its convolutions: the same function in eval, at less cost.

    - BatchNorm, SyncBatchNorm, frozen BatchNorm, `KN` and `NoNorm` go into the convolution,
      transposed convolution, linear layer or norm whose very output they take, and are gone.
    - Of `BCN`, `MicroBCN` and `SyncBCN` the batch stage does; an ``nn.GroupNorm`` stays.
    - A BatchNorm in front of a convolution (`IC` layers) goes into that one if it pads no zeros.
    - Convolutions with weight standardization become ``nn.Conv2d`` on the standardized weights.

    Which layers these are is found by running the model once. Where more than the norm takes an
    output, and wherever else it would not be exact, the norm stays.

    Args:
        model: any model; it stays as it is.
        inputs: an input, or several, to run it on; None: a random image of 64x64 with as many
            channels as its first 2-d convolution takes. With mmseg's models, the auxiliary heads
            run as well.

    Returns:
        A copy in eval mode, with a `FoldReport` as its attribute ``fold_report``.

    Raises:
        TypeError: ``model`` is no module.
        UsageError: the model does not run on the image or the inputs, or computes something else
            when it is folded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fold expects a model, an nn.Module, got {type(model)}")
    arguments = _arguments(model, inputs)
    folder = _Folder(deepcopy(model).eval())
    expected = _floats(folder.watch(arguments))
    if any(value.isnan().any() for value in expected):
        raise UsageError(
            "the model gives NaN on the image or inputs: give others, inputs=, or mend its weights "
            "(tools/checkpoints/inspect.py names those that are not finite)"
        )
    folded = folder.fold()
    difference = _difference(_floats(_run(folded, arguments, _BROKEN)), expected)
    bound = 3 * max((torch.finfo(t.dtype).eps for t in expected), default=0) ** 0.5
    if not difference <= bound:
        raise UsageError(
            f"the folded model's outputs differ by {difference:.1e} of the largest one, more than "
            f"{bound:.1e}: does the model compute something else at each run in eval, or keep "
            "references to its norms outside of its submodules?"
        )
    folded.fold_report = folder.report(difference)
    _LOGGER.info("%s", folded.fold_report)
    return folded


def _arguments(model: nn.Module, inputs: Any) -> tuple[Any, ...]:
    if inputs is not None:
        return inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        image = blank_image(model)
    except ValueError as error:
        raise UsageError(
            f"fold cannot guess an input of this model, {error}: give one, inputs="
        ) from None
    generator = torch.Generator().manual_seed(0)  # the run's own random numbers stay as they are
    return (torch.randn(image.shape, generator=generator).to(image),)


def _run(model: nn.Module, arguments: tuple[Any, ...], message: str) -> list[Any]:
    try:
        # an autocast around would give the dtypes of its operations for those of the model
        cuda, cpu = (torch.autocast(kind, enabled=False) for kind in ("cuda", "cpu"))
        with cuda, cpu, evaluating(model):
            return run_all(model, *tree_map_only(Tensor, Tensor.clone, arguments))
    except Exception as error:  # whatever a model may raise
        raise UsageError(message.format(f"{type(error).__name__}: {error}")) from error


def _floats(outputs: Any) -> list[Tensor]:
    leaves = (leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def _difference(values: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference as a share of the largest value."""
    if [v.shape for v in values] != [e.shape for e in expected]:
        return float("inf")
    pairs = [(v.double(), e.double()) for v, e in zip(values, expected, strict=True) if e.numel()]
    shares = [torch.zeros((), dtype=torch.float64)]
    for value, known in pairs:
        scale = known.abs().where(known.isfinite(), 0.0).max().clamp(min=_TINY)
        shares.append(((value - known).abs().where(value != known, 0.0).max() / scale).cpu())
    return float(torch.stack(shares).max())  # NaN where one is, unlike Python's


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers that can be folded, or be folded into; none inside of another."""
    if affine.is_norm(module) or affine.is_conv(module) or affine.is_group_norm(module):
        yield module
    else:
        for child in module.children():
            yield from _layers(child)


class _Folder:
    """Folds the layers of a model, which it changes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {m: name or type(m).__name__ for name, m in model.named_modules()}
        layers = list(dict.fromkeys(_layers(model)))
        self._layers = [layer for layer in layers if not has_hooks(layer)]
        self._flow = Flow(self._layers)
        self._now: dict[nn.Module, nn.Module] = {}  # what stands in for a layer
        self._ends: dict[nn.Module, list[nn.Module]] = {}  # whose affines its output comes from
        self._folded: dict[str, str] = {}
        self._stages: dict[str, str] = {}
        self._left: dict[nn.Module, str] = {}
        self._standardized: list[str] = []
        for norm in filter(affine.is_norm, layers):
            self._left[norm] = "has hooks" if has_hooks(norm) else "did not run"
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module not in layers and not self._inner(module):
                self._left[module] = f"is a {type(module).__name__}, which folding does not know"

    def _inner(self, module: nn.Module) -> bool:
        return any(getattr(layer, "bn", None) is module for layer in self._names)

    def watch(self, arguments: tuple[Any, ...]) -> list[Any]:
        """Run the model, and find what is joined to what."""
        with self._flow:
            outputs = _run(self._model, arguments, _UNFIT)
            self._flow.finish()
        return outputs

    def fold(self) -> nn.Module:
        """Fold all that can be; returns the model, or what stands in for it."""
        for layer in self._layers:
            if affine.is_standardized(layer) and layer not in self._flow.bare:
                self._stand_in(layer, affine.plain_conv(layer))
                self._standardized.append(self._names[layer])
        ran = list(self._flow.takers)  # in this order
        norms = list(filter(affine.is_norm, ran))
        others = [layer for layer in ran if not affine.is_norm(layer)]
        self._ends = {layer: [self._now.get(layer, layer)] for layer in others}
        for norm in norms:
            self._fold_back(norm)
        for conv in filter(affine.is_conv, others):
            self._fold_forward(conv)
        for conv, plain in self._now.items():
            if affine.is_conv(conv):
                plain.to(conv.weight.dtype)
        return self._replace()

    def report(self, difference: float) -> FoldReport:
        """What was done."""
        left = {self._names[norm]: reason for norm, reason in self._left.items()}
        return FoldReport(self._folded, self._stages, left, self._standardized, difference)

    def _fold_back(self, norm: nn.Module) -> None:
        reason = self._why_not(norm)
        two_stages, closed = affine.is_batch_channel_norm(norm), ends_in_activation(norm)
        if reason:
            self._left[norm] = reason
            if not two_stages and not closed:
                self._ends[norm] = [norm]
            return
        ends = list(dict.fromkeys(e for s in self._flow.sources[norm] for e in self._ends[s]))
        for end in ends:
            affine.scale_outputs(end, *affine.batch_affine(norm))
        dtype = self._flow.dtypes[norm]
        stage = affine.group_stage(norm, dtype) if two_stages else nn.Identity()
        self._stand_in(norm, nn.Sequential(stage, norm.drop, norm.act) if closed else stage)
        self._names[stage] = self._names[norm]
        if not closed:
            self._ends[norm] = [stage] if two_stages else ends
        place = ", ".join(sorted(self._names[end] for end in ends))
        (self._stages if two_stages else self._folded)[self._names[norm]] = place
        del self._left[norm]

    def _why_not(self, norm: nn.Module) -> str | None:
        """Why a norm cannot be folded into what comes before it."""
        flow = self._flow
        if norm in flow.bare:
            return "something else uses its parameters"
        if affine.batch_affine(norm) is None:
            return "normalizes by the batch's own statistics"
        if norm in flow.recast:
            return "changes the dtype"
        if not flow.sources[norm] or None in flow.sources[norm]:
            return "takes something else than the very output of a convolution or norm"
        for source in flow.sources[norm]:
            others = flow.takers[source] - {norm}
            if others:
                takers = sorted(self._names.get(t, t) for t in others)
                return f"{self._names[source]}'s output goes to {', '.join(takers)} too"
            ends = self._ends.get(source, [source])
            if not all(self._takes(end, norm) for end in ends):
                return f"{self._names[source]}, before it, cannot take it in"
        return None

    def _takes(self, end: nn.Module, norm: nn.Module) -> bool:
        """Whether a scale and a shift of a norm's channels can go into a layer."""
        if end in self._flow.bare or not affine.has_output_affine(end):
            return False
        channels, dim = affine.output_channels(end)
        scale, _ = affine.batch_affine(norm)
        return channels == len(scale) and (dim is None or self._flow.dims[norm] == {dim})

    def _fold_forward(self, conv: nn.Module) -> None:
        """Fold a norm that was left into the convolution that takes its output, where exact."""
        flow = self._flow
        (source, *more) = flow.sources[conv] or {None}
        (norm, *ends) = self._ends.get(source, [None])
        known = norm in self._left and affine.is_norm(norm) and not more and not ends
        if not known or flow.takers[source] != {conv} or {conv, norm} & (flow.bare | flow.recast):
            return
        host = self._now.get(conv, conv)
        if affine.batch_affine(norm) is None or flow.dims[conv] != {affine.input_dim(host)}:
            return
        if affine.pads_zeros(host):
            self._left[norm] += f"; {self._names[conv]}, behind it, pads zeros"
            return
        affine.scale_inputs(host, *affine.batch_affine(norm))
        self._stand_in(norm, nn.Identity())
        self._folded[self._names[norm]] = f"{self._names[conv]}, behind it"
        del self._left[norm]

    def _stand_in(self, layer: nn.Module, new: nn.Module) -> None:
        self._now[layer] = new
        self._names[new] = self._names[layer]

    def _replace(self) -> nn.Module:
        for parent in list(self._model.modules()):
            for key, child in parent._modules.items():
                if child in self._now:
                    parent._modules[key] = self._now[child]
        root = self._now.get(self._model, self._model)
        unlink_norms(root)  # links hold layers that are gone
        return root.eval()
