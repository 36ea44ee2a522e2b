"""Stops on a loss that is not finite, before it reaches the weights, and says where it began."""

from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from mmbcn.errors import UsageError
from mmbcn.layers import FrozenBN
from mmbcn.registry import HOOKS

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, FrozenBN)
_IN_A_ROW = 10  # so many steps skipped one after the other: it will not get better
_SHOWN = 8  # files named


@HOOKS.register_module()
class NonFiniteHook(Hook):
    """Check the training loss of every iteration before its backward pass.

    Costs one comparison per iteration, and over several ranks one exchange of a number. Only where
    the loss is NaN or infinite, the batch goes through the model once more, without gradients and
    without moving statistics, to find the first module whose output is not finite. Steps that the
    loss scaling of AMP skips have a finite loss and are no error.

    Args:
        action: ``'stop'`` ends the run; ``'skip'`` logs the finding and goes on with the next
            batch, weights and statistics as they were (the statistics are copied every iteration
            for this), but stops at the tenth time in a row.

    Raises:
        UsageError: names the iteration, the images, the module and the norm layer before it.
    """

    priority = "VERY_LOW"

    def __init__(self, action: str = "stop") -> None:
        if action not in ("stop", "skip"):
            raise UsageError(f"NonFiniteHook: action must be 'stop' or 'skip', got {action!r}")
        self.action = action
        self._in_a_row = 0

    def before_train(self, runner: Any) -> None:
        """Put the check between the loss and its backward pass."""
        wrapper = runner.optim_wrapper
        update = self._update_params = wrapper.update_params

        @torch.compiler.disable
        def checked(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            if self._may_update(runner, loss):
                update(loss, *args, **kwargs)

        wrapper.update_params = checked

    def after_train(self, runner: Any) -> None:
        """Take the check away again."""
        runner.optim_wrapper.update_params = self._update_params

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Keep the batch, and the statistics where the step may be skipped."""
        self._batch = data_batch
        if self.action == "skip":
            self._buffers = _copies(runner.model)

    def _may_update(self, runner: Any, loss: Tensor) -> bool:
        bad = (~loss.detach().isfinite()).any().float()
        all_reduce(bad, "max")  # all ranks stop or skip together: the second pass may exchange too
        if not bad:
            self._in_a_row = 0
            return True
        text = _diagnosis(runner, loss, self._batch)
        self._in_a_row += 1
        if self.action == "stop" or self._in_a_row == _IN_A_ROW:
            raise UsageError(text)
        _restore(runner.model, self._buffers)
        runner.logger.warning(f"Skipping this step: {text}")
        return False


def _copies(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


@torch.no_grad()
def _restore(model: nn.Module, copies: list[Tensor]) -> None:
    for buffer, copy in zip(model.buffers(), copies, strict=True):
        buffer.copy_(copy)


class _Watch:
    """A forward hook that finds the first module whose output is not finite."""

    def __init__(self) -> None:
        self.found: nn.Module | None = None
        self.norm: tuple[nn.Module, float] | None = None  # the latest, and its largest output

    def __call__(self, module: nn.Module, _: Any, output: Any) -> None:
        if self.found is not None:
            return
        if not _is_finite(output):
            self.found = module
        elif isinstance(module, _NORMS) and output.numel():
            self.norm = module, output.abs().amax().item()


def _is_finite(value: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


@torch.no_grad()
def _diagnosis(runner: Any, loss: Tensor, batch: Any) -> str:
    """Pass the batch through the model again and say where it goes wrong."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    copies, watch = _copies(runner.model), _Watch()
    data = model.data_preprocessor(batch, True)
    handles = [module.register_forward_hook(watch) for module in model.modules()]
    try:
        with runner.optim_wrapper.optim_context(runner.model):
            losses = runner.model._run_forward(data, mode="loss")
    finally:
        for handle in handles:
            handle.remove()
        _restore(runner.model, copies)
    names = {module: name for name, module in model.named_modules()}
    terms = [k for k, v in losses.items() if "loss" in k and not _is_finite(v)]
    rate = max(map(max, runner.optim_wrapper.get_lr().values()))
    broken = [n for n, p in model.named_parameters() if not _is_finite(p)]
    where = "" if not _is_finite(loss) else " on another rank; here"
    return "\n".join(
        [
            f"the loss of iteration {runner.iter + 1} is not finite{where}: "
            f"{loss.detach().mean():g} (terms: {', '.join(terms) or 'none'}; "
            f"learning rate {rate:g})",
            f"  images: {_images(batch, data)}",
            *_place(watch, names),
            f"  weights: {_weights(model, broken)}",
            f"  what to do: {_advice(data, broken, watch)}",
        ]
    )


def _place(watch: _Watch, names: dict[nn.Module, str]) -> list[str]:
    if watch.found is None:
        return ["  first module whose output is not finite: none, in a second pass over the batch"]
    lines = [f"  first module whose output is not finite: {_title(watch.found, names)}"]
    if watch.norm is None:
        return [*lines, "  norm layer before it: none"]
    layer, largest = watch.norm
    return [*lines, f"  norm layer before it: {_title(layer, names)}, outputs up to {largest:g}"]


def _title(module: nn.Module, names: dict[nn.Module, str]) -> str:
    return f"{names[module] or 'the model'} ({type(module).__name__})"


def _inputs(data: Any) -> list[Tensor]:
    inputs = data.get("inputs") if isinstance(data, dict) else None
    return list(inputs) if isinstance(inputs, (Tensor, list)) else []


def _images(batch: Any, data: Any) -> str:
    samples = batch.get("data_samples") if isinstance(batch, dict) else None
    paths = [str(sample.get("img_path", "?")) for sample in samples or ()]
    wrong = [not _is_finite(image) for image in _inputs(data)]
    marks = [" (NOT FINITE)" if i < len(wrong) and wrong[i] else "" for i in range(len(paths))]
    named = [path + mark for path, mark in zip(paths, marks, strict=True)]
    named.sort(key=lambda text: not text.endswith(")"))  # those to blame first
    return ", ".join(named[:_SHOWN]) + (", ..." if len(named) > _SHOWN else "") or "not named"


def _weights(model: nn.Module, broken: list[str]) -> str:
    if broken:
        return f"{len(broken)} are not finite, the first is {broken[0]}"
    largest, name = max((p.abs().amax().item(), n) for n, p in model.named_parameters())
    return f"all finite, up to {largest:g} ({name})"


def _advice(data: Any, broken: list[str], watch: _Watch) -> str:
    if not _is_finite(_inputs(data)):
        return "mend or remove the images marked, or the data_preprocessor's mean and std"
    if broken:
        return "start from a checkpoint whose weights are finite, with a lower learning rate"
    return (
        "lower the learning rate, lengthen its warm-up, or clip gradients "
        "(optim_wrapper.clip_grad.max_norm=10); with float16, try optim_wrapper.dtype=bfloat16"
    )
