"""A model on loan: how it is run, what is changed for a measurement, and put back."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], Any]
Progress = Callable[[int, int | None], None]  # batches done, and of all, if known


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch of images, or of (images, labels)."""
    return model(batch[0] if isinstance(batch, (tuple, list)) else batch)


@contextmanager
def hooked(layers: Mapping[str, nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    """Call ``hook(name, layer, inputs)`` before each layer runs."""
    handles = [m.register_forward_pre_hook(partial(hook, name)) for name, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def kept_on_failure(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Copies of each module's buffers, which an exception puts back."""
    buffers = {name: dict(module.named_buffers()) for name, module in modules.items()}
    before = {name: {k: b.clone() for k, b in own.items()} for name, own in buffers.items()}
    try:
        yield before
    except BaseException:
        for name, own in buffers.items():
            for key, buffer in own.items():
                buffer.copy_(before[name][key])
        raise


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards the modes and ``requires_grad`` are as before.

    Not by ``train()``: backbones freeze parameters there.
    """
    modes = {module: module.training for module in model.modules()}
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, mode in trained.items():
            parameter.requires_grad_(mode)
