"""Tells whether a checkpoint is of the norm that a model has.

Loading is lenient in mmengine: a batch-channel checkpoint in a BatchNorm model only logs unexpected
keys, and weight standardization leaves no trace in the keys at all. So both the state dict and the
config that mmengine stores with a checkpoint are read. The config is parsed, never executed.
"""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mmbcn.layers import BatchChannelNorm, FrozenBN, NoNorm

_BATCH_NORM, _BATCH_CHANNEL, _PER_SAMPLE = "BatchNorm", "batch-channel norm", "GroupNorm"
_NO_NORM = "NoNorm"
_BATCH_STAGE = [f"{bn}.{k}" for bn in ("bn", "pbn") for k in ("weight", "bias", "running_mean")]
# Types of the same function in eval, so that a checkpoint may pass from one to the other.
_SAME = {
    **dict.fromkeys(("BN", "BN2d", "SyncBN", "FrozenBN"), _BATCH_NORM),
    **dict.fromkeys(("BCN", "MicroBCN", "SyncBCN"), _BATCH_CHANNEL),
    **dict.fromkeys(("GN", "AutoGroupNorm"), _PER_SAMPLE),
    **dict.fromkeys(("IN", "AffineInstanceNorm"), "InstanceNorm"),
    **dict.fromkeys(("WSConv2d", "ConvWS"), "weight standardization"),
}


def state_mismatch(model: nn.Module, state: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """The first norm layer whose kind in ``state`` is another: (layer, the model's, the state's).

    Args:
        model: the model that ``state`` would be loaded into.
        state: a state dict under the model's names; layers that it lacks are passed over.
    """
    for name, layer in norm_layers(model):
        kind = _kind(layer)
        if any(f"{name}.{stage}" in state for stage in _BATCH_STAGE):
            found = _BATCH_CHANNEL
        elif {f"{name}.running_mean", f"{name}.running_var"} & state.keys():
            found = _BATCH_NORM
        elif f"{name}.weight" in state:
            sizes = [state[k].numel() for k in (f"{name}.weight", f"{name}.bias") if k in state]
            found = _PER_SAMPLE if sizes[0] > 1 else _NO_NORM if sizes[-1] > 1 else kind
        else:
            continue
        if found != kind:
            return name, kind, found
    return None


def norm_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The norm layers with their paths; of a batch-channel norm, not its batch stage."""
    for name, child in module.named_children():
        if isinstance(child, (_NormBase, nn.GroupNorm, FrozenBN, NoNorm)):
            yield prefix + name, child
        else:
            yield from norm_layers(child, f"{prefix}{name}.")


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, BatchChannelNorm):
        return _BATCH_CHANNEL
    if isinstance(layer, NoNorm):
        return _NO_NORM
    return _PER_SAMPLE if isinstance(layer, nn.GroupNorm) else _BATCH_NORM


def parse_model(text: str) -> ast.AST | None:
    """The syntax tree of ``model`` in a config's text; None: there is none that can be read."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return None
    models = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "model" for t in node.targets)
    ]
    return models[-1] if models else None


def config_norms(text: str) -> set[str] | None:
    """What the ``model`` of a config's text normalizes and standardizes with; None: unreadable."""
    model = parse_model(text)
    if model is None:
        return None
    kinds = set()
    for node in ast.walk(model):
        if isinstance(node, ast.keyword) and node.arg in ("norm_cfg", "conv_cfg"):
            for call in ast.walk(node.value):
                kind = _call_kind(call)
                if kind:
                    kinds.add(kind)
    return kinds


def _call_kind(call: ast.AST) -> str | None:
    if not isinstance(call, ast.Call):
        return None
    options = {
        k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant) and k.arg
    }
    kind = str(options.pop("type", "")).rpartition(".")[2]
    if kind in ("", "Conv2d", "Conv"):
        return None
    for plain in ("requires_grad", "momentum", "eps", "warmup", "sync"):
        options.pop(plain, None)
    if kind in ("AutoGroupNorm", "BCN", "MicroBCN", "SyncBCN") and options == {
        "num_groups": "auto"
    }:
        options = {}
    if kind == "ConvWS":
        options = {"eps_inside": False}
    details = ", ".join(f"{k}={v}" for k, v in sorted(options.items()))
    return _SAME.get(kind, kind) + (f"({details})" if details else "")
