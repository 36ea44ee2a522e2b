"""From the names in foreign checkpoints to the names in a model.

============================  =====================================================================
in the checkpoint             in an mm model
============================  =====================================================================
``module.``, ``_orig_mod.``   nothing (of DataParallel and torch.compile)
``conv1``, ``bn1``,           under ``backbone.`` in a segmentor, bare in a backbone, whichever the
``layer1`` ...                checkpoint has
``conv1.0`` ... ``bn1``       ``stem.0`` ... ``stem.7``: the stem of three convolutions, as timm and
                              PyTorch-Encoding name it
``bn1``, ``gn1``, ``bn``      the model's own name of the norm at the same place (``gn1``, ``bn1``)
``aspp.*``                    ``decode_head.*``: the BCN authors' DeepLabV3 (and chenxi116's)
============================  =====================================================================
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmbcn.checkpoints.guard import norm_layers
from mmbcn.errors import UsageError

_WRAPPERS = ("module.", "_orig_mod.")
_NESTED = ("state_dict", "model", "model_state_dict", "model_state", "net", "network")
_DEEP_STEM = {f"conv1.{i}": f"stem.{i}" for i in (0, 1, 3, 4, 6)} | {"bn1": "stem.7"}
_ASPP = {
    **{f"aspp{i}": f"aspp_modules.{i - 1}.conv" for i in range(1, 5)},
    **{f"aspp{i}_bn": f"aspp_modules.{i - 1}.bn" for i in range(1, 5)},
    "aspp5": "image_pool.1.conv",
    "aspp5_bn": "image_pool.1.bn",
    "conv2": "bottleneck.conv",
    "bn2": "bottleneck.bn",
    "conv3": "conv_seg",
}
_NORM_NAME = re.compile(r"(.*\.|)(?:bn|gn|in|ln|norm)(\d*)$")

State = dict[str, Tensor]


def find_state(checkpoint: Mapping[str, Any], name: str, prefix: str | None = None) -> State:
    """The weights in a checkpoint, without wrappers' prefixes.

    Args:
        checkpoint: the content of a file: a state dict, or a dict with one in it.
        name: of the file, for messages.
        prefix: only what begins with it, without it.

    Raises:
        UsageError: there are no weights in it, or none under the prefix.
    """
    nested = next((k for k in _NESTED if isinstance(checkpoint.get(k), Mapping)), None)
    found = checkpoint[nested] if nested else checkpoint
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    if not state:
        raise UsageError(
            f"{name} holds no weights: expected a state dict, or one under 'state_dict', found "
            f"the keys {', '.join(map(str, list(checkpoint)[:8])) or '(none)'}"
        )
    while any(k.startswith(_WRAPPERS) for k in state):
        state = {re.sub(r"^(module|_orig_mod)\.", "", k): v for k, v in state.items()}
    if prefix:
        prefix = prefix.removesuffix(".").removeprefix("module.") + "."
        chosen = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if not chosen:
            parts = sorted({k.partition(".")[0] for k in state})
            raise UsageError(f"{name} has nothing under {prefix!r}; it has: {', '.join(parts)}")
        return chosen
    return state


def map_keys(model: nn.Module, state: State) -> tuple[State, Counter[str], list[str]]:
    """Rename what ``state`` holds to the model's names.

    Args:
        model: a segmentor, a backbone, or any module.
        state: from `find_state`.

    Returns:
        The renamed state; what was done -> how many entries; the entries that were left out,
        since the model is a part only of what the checkpoint holds.
    """
    done: Counter[str] = Counter()
    left_out: list[str] = []
    parts = dict(model.named_children())
    is_deeplab = any(k.startswith("aspp.aspp1.") for k in state)
    if is_deeplab and "decode_head" in parts:
        state = _from_deeplab(state, done)
    elif "backbone" in parts and not any(k.partition(".")[0] in parts for k in state):
        state = {f"backbone.{k}": v for k, v in state.items()}
        done["put under backbone."] += len(state)
    elif "backbone" not in parts:
        kept = {k for k in state if k.startswith("backbone.")}
        if kept:
            left_out = [k for k in state if k not in kept]
            state = {k.removeprefix("backbone."): state[k] for k in state if k in kept}
            done["taken from under backbone."] += len(state)
        elif is_deeplab:
            left_out = [k for k in state if k.startswith("aspp.")]
            state = {k: v for k, v in state.items() if not k.startswith("aspp.")}
    state = _deep_stem(model, state, done)
    return _norm_names(model, state, done), done, left_out


def _rename(state: State, names: Mapping[str, str], done: Counter[str], how: str) -> State:
    """Rename modules: ``names`` maps a module's path to another."""
    new: State = {}
    for key, value in state.items():
        path = key
        while path and path not in names:
            path = path.rpartition(".")[0]
        if path:
            done[how] += 1
        new[names[path] + key.removeprefix(path) if path else key] = value
    return new


def _from_deeplab(state: State, done: Counter[str]) -> State:
    """The BCN authors' DeepLabV3 as mmseg's EncoderDecoder with an ASPP head."""
    state = dict(state)
    fuse = state.get("aspp.conv2.weight")
    if fuse is not None:  # theirs concatenates the image pooling last, mmseg's first
        state["aspp.conv2.weight"] = fuse.roll(fuse.shape[1] // 5, 1)
        done["input channels of aspp.conv2 reordered (image pooling first)"] += 1
    names = {f"aspp.{k}": f"decode_head.{v}" for k, v in _ASPP.items()}
    heads = {k.partition(".")[0] for k in state} - {"aspp"}
    names |= {part: f"backbone.{part}" for part in heads}
    return _rename(state, names, done, "names of the authors' DeepLabV3 -> mmseg's")


def _deep_stem(model: nn.Module, state: State, done: Counter[str]) -> State:
    prefix = "backbone." if any(k.startswith("backbone.") for k in state) else ""
    if f"{prefix}conv1.0.weight" not in state:
        return state
    if f"{prefix}stem.0.weight" not in model.state_dict():
        return state
    names = {prefix + k: prefix + v for k, v in _DEEP_STEM.items()}
    return _rename(state, names, done, "conv1.*, bn1 -> stem.*")


def _norm_names(model: nn.Module, state: State, done: Counter[str]) -> State:
    """Rename norms that stand at the model's places under another name."""
    stems = {key.rpartition(".")[0].removesuffix(".bn").removesuffix(".pbn") for key in state}
    stems |= {key.rpartition(".")[0] for key in state}
    places: dict[tuple[str, str], str] = {}
    for path in stems:
        match = _NORM_NAME.match(path)
        if match:
            places.setdefault((match[1], match[2]), path)
    names = {}
    for path, _ in norm_layers(model):
        match = _NORM_NAME.match(path)
        theirs = places.get((match[1], match[2])) if match else None
        if theirs and theirs != path and path not in stems:
            names[theirs] = path
    how = "norms named as in the model"
    if names:
        theirs, ours = next(iter(names.items()))
        how += f" ({theirs.rpartition('.')[2]} -> {ours.rpartition('.')[2]})"
    return _rename(state, names, done, how) if names else state
