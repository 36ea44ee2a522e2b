"""The named normalizations, and the two switches: on a config and on a built module.

A name is a normalization, with ``_ws`` behind it where every convolution that a norm follows is
weight-standardized too (Qiao et al. 2019, https://arxiv.org/abs/1903.10520).
"""

import copy
import inspect
import logging
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from mmbcn.errors import UsageError, nearest
from mmbcn.layers import (
    BCN,
    IC,
    KN,
    AffineInstanceNorm,
    AutoGroupNorm,
    BatchChannelNorm,
    FrozenBN,
    MicroBCN,
    NoNorm,
    SyncBCN,
    WSConv2d,
    link_norms,
)
from mmbcn.layers.foreign import drop_and_activate, eps_of, has_hooks
from mmbcn.layers.kn import LEARNED

Cfg = TypeVar("Cfg", bound=dict)
_LOGGER = logging.getLogger(__name__)

# name -> (norm_cfg, the class that it builds)
_NORMS: dict[str, tuple[dict[str, Any], type[nn.Module]]] = {
    "bn": (dict(type="BN"), nn.BatchNorm2d),
    "syncbn": (dict(type="SyncBN"), nn.SyncBatchNorm),
    "frozen_bn": (dict(type="mmbcn.FrozenBN"), FrozenBN),
    "gn": (dict(type="mmbcn.AutoGroupNorm"), AutoGroupNorm),
    "ln": (dict(type="mmbcn.AutoGroupNorm", num_groups=1), AutoGroupNorm),
    "in": (dict(type="mmbcn.AffineInstanceNorm"), AffineInstanceNorm),
    "none": (dict(type="mmbcn.NoNorm"), NoNorm),
    "bcn": (dict(type="mmbcn.BCN", num_groups="auto"), BCN),
    "microbcn": (dict(type="mmbcn.MicroBCN", num_groups="auto"), MicroBCN),
    "syncbcn": (dict(type="mmbcn.SyncBCN", num_groups="auto"), SyncBCN),
    "kn": (dict(type="mmbcn.KN"), KN),
    "ic": (dict(type="mmbcn.IC"), IC),
}
_WS = "_ws"
_WS_CFG = dict(type="mmbcn.WSConv2d")
_PLAIN_CONVS = ("Conv2d", "Conv", "ConvWS", "WSConv2d")  # what conv_cfg may say and be switched
# IC layers stand in front of the convolutions: mmseg's component -> ours in that order
_IC_MODELS = {
    **{f"mmseg.{kind}": f"mmbcn.IC{kind}" for kind in ("ResNet", "ResNetV1c", "ResNetV1d")},
    **{f"mmseg.{kind}": f"mmbcn.IC{kind}" for kind in ("ASPPHead", "FCNHead")},
    "mmbcn.PointwiseFuseASPPHead": "mmbcn.ICPointwiseFuseASPPHead",
}
_TOKEN_NORMS = ("LN", "LN2d", "LayerNorm", "LayerNorm2d")  # of transformers: not ours to switch
_NO_LAYERS_INSIDE = ("data_preprocessor", "init_cfg", "train_cfg", "test_cfg", "act_cfg")
_SCOPES = ("mmseg", "mmdet", "mmpretrain")
_FROZEN = ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")  # torchvision's, detectron2's, timm's
# whose forward is what the name says; a subclass may inherit it, but not change it
_KNOWN = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm)
_TIMM = ("timm.layers.norm.GroupNorm", "timm.layers.norm.GroupNorm1")  # nn.GroupNorm's, but faster
# settings that layers of one class keep
_SETTINGS = ("sync", "process_group", "warmup", "q", "transition")
_UNUSABLE: set[str] = set()  # scopes whose package is installed, but does not import
_LINKED = "mmbcn.norms.linked_model"  # the type that builds a model and links its norms


def norm_names() -> list[str]:
    """The names that `set_norm`, `convert_norm` and ``--norm`` know."""
    return [name + suffix for name in _NORMS for suffix in ("", _WS)]


def _check_name(name: str) -> tuple[str, bool]:
    """Split a name into the normalization and whether weights are standardized."""
    if name not in norm_names():
        hint = nearest(str(name).lower(), norm_names())
        raise UsageError(f"unknown norm {name!r}{hint} Known: {', '.join(norm_names())}")
    return name.removesuffix(_WS), name.endswith(_WS)


# --- configs -------------------------------------------------------------------------------------


def set_norm(model_cfg: Cfg, name: str) -> Cfg:
    """Switch a config's normalization, and its convolutions where the name ends in ``_ws``.

    Replaces every ``norm_cfg`` (as a whole, so no key of the old one stays), at any depth, in
    lists too, and adds one where a component's class would build a BatchNorm without being told.
    ``norm_cfg=None`` stays, and so do the LayerNorms of transformers. ``conv_cfg`` becomes
    `WSConv2d` beside each of them, or plain again. The final classifier never is: mm heads build
    it as ``nn.Conv2d``. For norms that look at the layers before them, the ``type`` of the whole
    becomes `linked_model`, and back: whoever builds it gets the same model with its norms linked.

    ``'ic'`` also changes the *types* of components to those whose layers come in the order that IC
    layers are for (`ICResNet`, `ICASPPHead`, ...), and every other name changes them back.

    Args:
        model_cfg: the ``model`` of a config, changed in place.
        name: one of `norm_names`.

    Returns:
        ``model_cfg``

    Raises:
        TypeError: ``model_cfg`` is no dict.
        UsageError: the name is unknown, nothing was found to switch, or a component cannot
            standardize weights (it takes no ``conv_cfg``, or uses another convolution) or has no
            counterpart with IC layers.

    Example::

        _base_ = './deeplabv3_r50_bn_40k_cityscapes-512x1024.py'
        from mmbcn import set_norm
        model = set_norm(_base_.model, 'bcn')
    """
    base, ws = _check_name(name)
    if not isinstance(model_cfg, dict):
        raise TypeError(
            f"set_norm expects the model dict of a config, got {type(model_cfg)}; "
            "for a built model use mmbcn.convert_norm"
        )
    places = list(_find_norm_cfgs(model_cfg, "model"))
    if not places:
        raise UsageError(
            "set_norm found no norm_cfg to switch in this config, and no component that would "
            "build a BatchNorm by default; is it the `model` of a config?"
        )
    kinds = [_new_kind(holder, path, base) for holder, path in places]
    conv_cfgs = [_new_conv_cfg(holder, path, ws, name) for holder, path in places]
    for (holder, _), conv_cfg, kind in zip(places, conv_cfgs, kinds, strict=True):
        if kind != holder.get("type"):
            holder["type"] = kind
            holder.pop("unit", None)
        new = [type(holder)(**_NORMS[base][0], requires_grad=True) for _ in _as_list(holder)]
        holder["norm_cfg"] = new if isinstance(holder.get("norm_cfg"), list) else new[0]
        if conv_cfg is not None or holder.get("conv_cfg") is not None:
            holder["conv_cfg"] = conv_cfg
    if model_cfg.get("type") == _LINKED:
        model_cfg["type"] = model_cfg.pop("linked_type")
    if _NORMS[base][1] is KN and "type" in model_cfg:
        model_cfg.update(type=_LINKED, linked_type=model_cfg["type"])
    return model_cfg


def linked_model(linked_type: Any, **kwargs: Any) -> nn.Module:
    """Build a model of a config, and link its norms to their predecessors.

    Args:
        linked_type: the model's own ``type``.
        **kwargs: its other settings.
    """
    cls = find_class(linked_type)
    if cls is None:
        raise UsageError(f"the model {linked_type!r} is not in the registries of {_SCOPES}")
    model = cls(**kwargs)
    link_norms(model)
    return model


def _as_list(holder: dict[str, Any]) -> list[Any]:
    norm_cfg = holder.get("norm_cfg")
    return norm_cfg if isinstance(norm_cfg, list) else [norm_cfg]


def _find_norm_cfgs(node: Any, path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """All dicts whose norm is to be switched, with their places in the config."""
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _find_norm_cfgs(item, f"{path}[{i}]")
    if not isinstance(node, dict):
        return
    if "norm_cfg" in node:
        types = [_type_name(c) for c in _as_list(node) if isinstance(c, dict)]
        if types and not any(t in _TOKEN_NORMS for t in types):
            yield node, path
    elif "type" in node:
        default = _parameter(find_class(_own_type(node)), "norm_cfg")
        if isinstance(default, dict) and "BN" in _type_name(default):
            yield node, path
    for key, value in node.items():
        if key not in (*_NO_LAYERS_INSIDE, "norm_cfg", "conv_cfg") and not key.startswith("loss"):
            yield from _find_norm_cfgs(value, f"{path}.{key}")


def _type_name(cfg: dict[str, Any]) -> str:
    kind = cfg.get("type", "")
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def _own_type(cfg: dict[str, Any]) -> Any:
    return cfg.get("linked_type") if cfg.get("type") == _LINKED else cfg.get("type")


def _new_conv_cfg(holder: dict[str, Any], path: str, ws: bool, name: str) -> dict[str, Any] | None:
    old = holder.get("conv_cfg")
    switchable = old is None or _type_name(old) in _PLAIN_CONVS
    if not ws:
        return None if switchable else old
    if not switchable:
        raise UsageError(
            f"{name!r} cannot standardize the weights of {path}: its conv_cfg is "
            f"{old['type']!r}; use {name.removesuffix(_WS)!r}, or a conv_cfg of Conv2d"
        )
    cls = find_class(_own_type(holder))
    if cls is not None and _parameter(cls, "conv_cfg") is inspect.Parameter.empty:
        raise UsageError(
            f"{name!r} cannot standardize the weights of {path}: {_own_type(holder)} takes no "
            f"conv_cfg; use {name.removesuffix(_WS)!r}, or mmbcn.convert_norm on the built model"
        )
    return type(holder)(**_WS_CFG)


def _new_kind(holder: dict[str, Any], path: str, base: str) -> Any:
    """The type of a component in the order of layers that the norm is for."""
    old = holder.get("type")
    name = old if isinstance(old, str) and "." in old else f"mmseg.{_type_name(holder)}"
    if base != "ic":
        return next((k for k, ic in _IC_MODELS.items() if ic == name), old)
    if name in _IC_MODELS.values():
        return old
    if name not in _IC_MODELS:
        kinds = ", ".join(kind.rpartition(".")[2] for kind in _IC_MODELS)
        raise UsageError(
            f"'ic' needs components whose norms stand in front of the convolutions. There is none "
            f"for {path}, a {_type_name(holder) or 'part without type'}; there are some for {kinds}"
        )
    return _IC_MODELS[name]


def find_class(kind: Any) -> type | None:
    """The class that a ``type=`` means, where an installed mm package registers it."""
    if not isinstance(kind, str):
        return kind if inspect.isclass(kind) else None
    if find_spec("mmengine") is None:
        return None
    from mmengine.registry import DefaultScope

    current = DefaultScope.get_current_instance()
    scopes = [current.scope_name] if current else []
    scopes += [scope for scope in _SCOPES if find_spec(scope)]
    names = [kind] if "." in kind else [f"{scope}.{kind}" for scope in scopes]
    return next((cls for cls in map(_look_up, names) if inspect.isclass(cls)), None)


def _look_up(name: str) -> Any:
    """What is registered under ``scope.name``; None where the scope's package does not import."""
    from mmengine.registry import MODELS

    scope = name.partition(".")[0]
    if scope in _UNUSABLE:
        return None
    try:
        return MODELS.get(name)
    except (ImportError, OSError, RuntimeError):  # mmdet without mmcv's compiled operations, ...
        _UNUSABLE.add(scope)
        return None


def _parameter(cls: type | None, name: str) -> Any:
    """The default of a constructor's parameter, looked up through ``**kwargs``; empty: none."""
    for base in cls.__mro__ if cls else ():
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters
        if name in parameters:
            default = parameters[name].default
            return None if default is inspect.Parameter.empty else default
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return inspect.Parameter.empty


# --- built modules -------------------------------------------------------------------------------


def convert_norm(module: nn.Module, name: str) -> nn.Module:
    """Switch the normalization of a built model of any origin, keeping its weights.

    Swaps BatchNorm, SyncBatchNorm, GroupNorm, InstanceNorm, frozen BatchNorm and the
    batch-channel norms; LayerNorm stays. Per-channel affines and running statistics carry over
    (into the batch stage of a batch-channel norm; weights that are all zero, of zero-initialised
    residual branches, into its group stage), with eps, momentum, device, dtype, mode and
    ``requires_grad``, and between norms of one kind all else, as the number of groups.

    With ``_ws``, each ``nn.Conv2d`` that a norm of its width follows, in the order of their
    definition, becomes a `WSConv2d` on the same parameter; a final classifier has none behind it
    and stays. Those that stay are logged. Without, a `WSConv2d` becomes an ``nn.Conv2d`` on its
    standardized weights. Norms that look at the layers before them are linked to these, see
    `mmbcn.layers.link_norms`. Convert before the optimizer is built: the norms' parameters are new
    ones.

    Args:
        module: the model, changed in place.
        name: one of `norm_names`.

    Returns:
        ``module``, or the new layer where ``module`` itself is a norm.

    Raises:
        TypeError: ``module`` is no module.
        UsageError: the name is unknown, there is nothing to convert, a BatchNorm of another kind
            (`InPlaceABN`, lazy layers that never ran) would stay, or something would be lost: what
            a subclass adds in its ``forward``, a layer's hooks, how a convolution computes its
            weight. ``module`` is as it was.
    """
    base, ws = _check_name(name)
    if base == "ic":
        raise UsageError(
            "convert_norm cannot give a built model IC layers: they stand in front of "
            "convolutions, where its norms stand behind. Build mmbcn.models.ICResNet and IC heads, "
            "or switch a config: set_norm(model_cfg, 'ic')"
        )
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"convert_norm expects a built model, an nn.Module, got {type(module)}; "
            "for the model of a config use mmbcn.set_norm"
        )
    names = {m: n for n, m in module.named_modules()}
    layers = list(_layers(module))
    swaps: dict[nn.Module, nn.Module] = {}
    like = next(_floats(module), None)
    for layer, follower in zip(layers, [*layers[1:], None], strict=True):
        like = next(_floats(layer), like)
        if _width(layer) or "running_mean" in layer._buffers:
            _check_norm(layer, names[layer])
            swaps[layer] = _new_norm(layer, base, like)
        elif ws and _is_plain_conv(layer) and _width(follower) == layer.out_channels:
            _check_conv(layer, names[layer])
            try:
                swaps[layer] = _new_conv(WSConv2d, layer)
            except ValueError as error:
                raise UsageError(f"{names[layer]}: {error}") from error
        elif not ws and isinstance(layer, WSConv2d):
            _check_conv(layer, names[layer])
            swaps[layer] = _new_conv(nn.Conv2d, layer)
            swaps[layer].weight = nn.Parameter(
                layer.standardized_weight().detach(), layer.weight.requires_grad
            )
    if not any(map(_width, swaps)):
        raise UsageError(
            f"convert_norm found no BatchNorm, GroupNorm or InstanceNorm in "
            f"{type(module).__name__} to convert to {name!r}"
        )
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d) and layer not in swaps]
    plain = [names[conv] for conv in convs if not isinstance(conv, WSConv2d)]
    if ws and plain:
        _LOGGER.info("convert_norm: weights that are not standardized: %s", ", ".join(plain))
    for parent in list(module.modules()):
        for key, child in parent._modules.items():
            if child in swaps:
                parent._modules[key] = swaps[child]
    module = swaps.get(module, module)
    link_norms(module)
    return module


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Norms, convolutions and linear layers in the order of their definition."""
    known = _width(module) or isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    if known or "running_mean" in module._buffers:  # a BatchNorm of some kind
        yield module
    else:
        for child in module.children():
            yield from _layers(child)


def _floats(module: nn.Module) -> Iterator[torch.Tensor]:
    """Its parameters and buffers of real numbers."""
    return (t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())


def _is_plain_conv(layer: nn.Module) -> bool:
    kind = type(layer)
    if parametrize.is_parametrized(layer):  # its class is that of its copies
        kind = kind.__base__
    return kind.__name__ == "Conv2d"


def _check_norm(layer: nn.Module, name: str) -> None:
    """Refuse a norm that is none of those that are known."""
    kind = type(layer)
    if not _width(layer):
        raise UsageError(
            f"convert_norm cannot convert {name}, a {kind.__name__}: it knows those of torch, "
            "torchvision, timm and mmbcn. Build the model with nn.BatchNorm2d; of lazy layers, run "
            "it once before"
        )
    forwards = {cls.forward for cls in (*_KNOWN, *(cls for _, cls in _NORMS.values()))}
    known = kind.forward in forwards or kind.__name__ in _FROZEN
    known |= f"{kind.__module__}.{kind.__qualname__}" in _TIMM
    known |= hasattr(layer, "act") and hasattr(layer, "drop")  # which go along
    if not known or "forward" in vars(layer):
        raise UsageError(
            f"convert_norm would lose what {name}, a {kind.__name__}, does in its own forward. If "
            "that is what nn.BatchNorm2d does, build the model with nn.BatchNorm2d; else exclude "
            "the layer: convert the parts around it"
        )
    _check_hooks(layer, name)


def _check_conv(layer: nn.Module, name: str) -> None:
    """Refuse a convolution of which the new one would lose something."""
    if parametrize.is_parametrized(layer) or "weight" not in layer._parameters:
        raise UsageError(
            f"convert_norm cannot switch the standardization of {name}: it computes its weight "
            "from others (weight or spectral normalization). Store the weight before, by "
            "torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm"
        )
    _check_hooks(layer, name)


def _check_hooks(layer: nn.Module, name: str) -> None:
    if has_hooks(layer):
        raise UsageError(
            f"{name} has forward hooks, which convert_norm would lose: register them on the new "
            "layer, after it"
        )


def _width(layer: nn.Module | None) -> int:
    """Channels of a norm that can be converted; 0 for everything else."""
    if isinstance(layer, (_NormBase, FrozenBN, NoNorm)):
        return layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if type(layer).__name__ in _FROZEN:
        return layer.weight.numel()
    return 0


def _new_norm(old: nn.Module, base: str, like: torch.Tensor | None) -> nn.Module:
    cfg, cls = _NORMS[base]
    options = {k: v for k, v in cfg.items() if k != "type"}
    if cls is nn.BatchNorm2d and type(old) in (nn.BatchNorm1d, nn.BatchNorm3d):
        cls = type(old)  # they check the input's dimensions
    kept = ("momentum", *(_SETTINGS if type(old) is cls else ()))
    known = inspect.signature(cls).parameters
    options |= {key: getattr(old, key) for key in kept if key in known and hasattr(old, key)}
    two_stages = isinstance(old, BatchChannelNorm), issubclass(cls, BatchChannelNorm)
    if all(two_stages) or (base == "gn" and _has_groups(old)):
        options["num_groups"] = old.num_groups
    new = cls(_width(old), eps=eps_of(old), **options)
    if isinstance(old, KN) and isinstance(new, KN):
        for key in LEARNED:
            new.register_parameter(key, copy.deepcopy(getattr(old, key)))
    if like is not None:
        new.to(like.device, like.dtype)
    stage = old.bn if two_stages == (True, False) else old
    state = stage.state_dict()
    if not two_stages[1]:
        known = new.state_dict()
        state = {k: v for k, v in state.items() if k in known}
    if "weight" in state and isinstance(old, NoNorm) != isinstance(new, NoNorm):  # one factor
        weight = state["weight"]
        state["weight"] = weight.mean()[None] if cls is NoNorm else weight.expand(_width(old))
    if state:
        new.load_state_dict(state, strict=False)
    if two_stages[1] and not (new.bn.weight.is_meta or new.bn.weight.any()):  # zero-init residual
        nn.init.ones_(new.bn.weight)
        nn.init.zeros_(new.weight)
    trained = {key: p.requires_grad for key, p in stage.named_parameters()}
    if two_stages == (False, True):
        trained = {f"bn.{key}": mode for key, mode in trained.items()}
    for key, parameter in new.named_parameters():
        parameter.requires_grad_(trained.get(key, all(trained.values())))
    if hasattr(old, "act") and hasattr(old, "drop"):  # timm's norms that end in an activation
        new.drop, new.act = old.drop, old.act
        new.register_forward_hook(drop_and_activate)
    return new.train(old.training)


def _has_groups(norm: nn.Module) -> bool:
    """Whether it is a group normalization, and neither a layer nor an instance normalization."""
    plain = isinstance(norm, nn.GroupNorm) and not isinstance(norm, BatchChannelNorm)
    return plain and 1 < norm.num_groups < norm.num_channels


def _new_conv(cls: type[nn.Conv2d], old: nn.Conv2d) -> nn.Conv2d:
    new = cls(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        old.stride,
        old.padding,
        old.dilation,
        old.groups,
        old.bias is not None,
        old.padding_mode,
        device="meta",
    )
    new.weight, new.bias = old.weight, old.bias
    return new.train(old.training)
