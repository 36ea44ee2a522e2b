"""Registries: children of mmengine's under the scope ``mmbcn``, and the classic ``NORM_LAYERS``.

mmcv 1.x's ``NORM_LAYERS`` was merged into mmengine's ``MODELS``, where ``build_norm_layer`` looks.
Layers are therefore registered twice: in ``NORM_LAYERS``, which lists what this package adds, and
in mmengine's root ``MODELS``, so that plain names resolve from any scope. ``type='mmbcn.BCN'``
needs no ``custom_imports``: mmengine imports ``mmbcn.registry`` for the scope ``mmbcn``.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from mmbcn.errors import missing_package

try:
    from mmengine import registry as _mmengine
except ModuleNotFoundError as error:
    if error.name != "mmengine":
        raise
    _mmengine = None

T = TypeVar("T", bound=type)


class _NoRegistry:
    """Stands in for a registry where mmengine is missing: registering is a no-op."""

    def register_module(self, *args: Any, **kwargs: Any) -> Callable[[T], T]:
        return lambda cls: cls

    def __getattr__(self, name: str) -> Any:
        raise missing_package(f"mmbcn.registry ({name})", "mmengine")


if _mmengine is None:
    _ROOT_MODELS = MODELS = NORM_LAYERS = _NoRegistry()
    DATASETS = TRANSFORMS = HOOKS = RUNNERS = OPTIM_WRAPPERS = _NoRegistry()
else:
    _ROOT_MODELS = _mmengine.MODELS

    def _child(name: str, parent: Any, location: str, scope: str = "mmbcn") -> Any:
        return _mmengine.Registry(name, parent=parent, scope=scope, locations=[location])

    MODELS = _child("model", _ROOT_MODELS, "mmbcn.models")
    NORM_LAYERS = _child("norm layer", MODELS, "mmbcn.layers", scope="mmbcn_norm")
    DATASETS = _child("dataset", _mmengine.DATASETS, "mmbcn.datasets")
    TRANSFORMS = _child("transform", _mmengine.TRANSFORMS, "mmbcn.datasets")
    HOOKS = _child("hook", _mmengine.HOOKS, "mmbcn.engine")
    RUNNERS = _child("runner", _mmengine.RUNNERS, "mmbcn.engine")
    OPTIM_WRAPPERS = _child("optim wrapper", _mmengine.OPTIM_WRAPPERS, "mmbcn.engine")


def register_norm(cls: T) -> T:
    """Class decorator: register a normalization layer under its class name."""
    NORM_LAYERS.register_module()(cls)
    return register_layer(cls)


def register_layer(cls: T) -> T:
    """Class decorator: register any other layer under its class name, for every scope."""
    _ROOT_MODELS.register_module()(cls)
    return cls
