"""Norm layers of other packages: what is theirs beside the parameters."""

from typing import Any

from torch import Tensor, nn


def is_frozen(module: nn.Module) -> bool:
    """Whether it is the frozen BatchNorm of torchvision, detectron2 or DETR, by its name."""
    return type(module).__name__ == "FrozenBatchNorm2d"


def eps_of(norm: nn.Module) -> float:
    """The eps of a norm; some ``FrozenBatchNorm2d`` have 1e-5 in their forward alone."""
    return getattr(norm, "eps", 1e-5)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks may change what comes in or out, other than `drop_and_activate`."""
    hooks = set(module._forward_hooks.values()) - {drop_and_activate}
    return bool(hooks or module._forward_pre_hooks)


def ends_in_activation(norm: nn.Module) -> bool:
    """Whether it is a converted norm with an activation behind."""
    return drop_and_activate in norm._forward_hooks.values()


def drop_and_activate(norm: nn.Module, _: Any, output: Tensor) -> Tensor:
    """The hook of a converted norm that ends in an activation, as timm's do."""
    return norm.act(norm.drop(output))
