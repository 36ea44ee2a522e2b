"""Looks into a checkpoint: its entries, norms, meta and faults; and compares two."""

import ast
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmbcn.checkpoints.guard import parse_model
from mmbcn.checkpoints.key_maps import State

_BUFFERS = re.compile(r"(^|\.)(running_mean|running_var|num_batches_tracked|steps)$")
_STAGE = re.compile(r"(^|.*\.)p?bn$")
_META = ("iter", "epoch", "time", "seed", "mmengine_version", "mmbcn_version", "experiment_name")
_HISTORY = ("converted_from", "averaged", "calibrated", "equalized")


class Entry(NamedTuple):
    """One tensor of a checkpoint.

    Attributes:
        key: its name.
        dtype: without ``torch.``.
        shape: as ``32x3x7x7``.
        numel: number of values.
        mean: of all values.
        std: their biased standard deviation.
        faults: what is wrong with it.
    """

    key: str
    dtype: str
    shape: str
    numel: int
    mean: float
    std: float
    faults: list[str]


class Difference(NamedTuple):
    """How a tensor differs between two checkpoints.

    Attributes:
        key: its name.
        largest: largest absolute difference of a value.
        relative: norm of the difference over the norm of the first.
    """

    key: str
    largest: float
    relative: float


def entries(state: State) -> list[Entry]:
    """The tensors with their faults."""
    found = []
    for key, value in state.items():
        numbers = value.detach().double()
        mean = float(numbers.mean()) if value.numel() else 0.0
        std = float(numbers.std(correction=0)) if value.numel() else 0.0
        shape = "x".join(map(str, value.shape)) or "()"
        dtype = str(value.dtype).removeprefix("torch.")
        found.append(Entry(key, dtype, shape, value.numel(), mean, std, _faults(key, value, state)))
    return found


def _faults(key: str, value: Tensor, state: State) -> list[str]:
    found = []
    if value.is_floating_point():
        bad = int((~value.isfinite()).sum())
        if bad:
            found.append(f"{bad} of {value.numel()} non-finite")
    path, _, name = key.rpartition(".")
    if name == "running_var":
        counts = {"zero": int((value == 0).sum()), "negative": int((value < 0).sum())}
        found += [f"{n} of {value.numel()} variances {what}" for what, n in counts.items() if n]
        mean = state.get(f"{path}.running_mean" if path else "running_mean")
        if mean is not None and value.eq(1).all() and mean.eq(0).all():
            found.append("statistics never updated")
    return found


def num_parameters(state: State) -> int:
    """Number of trained values: all but running statistics and counters."""
    return sum(v.numel() for k, v in state.items() if not _BUFFERS.search(k))


def has_statistics(state: State) -> bool:
    """Whether there are norms with running statistics."""
    return any(key.endswith("running_mean") for key in state)


def norm_kinds(state: State) -> Counter[str]:
    """The kinds of norm layers that the entries show -> how many there are.

    BCN, SyncBCN and MicroBCN have the same entries, and so have GroupNorm, LayerNorm and
    InstanceNorm; weight standardization leaves none.
    """
    kinds: Counter[str] = Counter()
    outer = set()
    for key in state:
        path = key.rpartition(".")[0]
        if not key.endswith("running_mean"):
            continue
        match = _STAGE.match(path)
        group = state.get(f"{match[1]}weight") if match else None
        if group is not None and (group.dim() == 1 or group.shape[::2] == (1, 1)):
            outer.add(match[1].removesuffix("."))
            kinds[f"batch-channel norm, {group.numel()} groups"] += 1
        else:
            kinds["BatchNorm"] += 1
    for key, value in state.items():
        path, _, name = key.rpartition(".")
        bias = state.get(f"{path}.bias" if path else "bias")
        has_statistics = (f"{path}.running_mean" if path else "running_mean") in state
        if name == "weight" and value.dim() == 1 and bias is not None and path not in outer:
            kinds["GroupNorm or alike (per sample)"] += not has_statistics
    return +kinds


def config_layers(text: str) -> str:
    """The types that a config's ``model`` has in ``norm_cfg`` and ``conv_cfg``."""
    model = parse_model(text)
    found: dict[str, set[str]] = {"norm_cfg": set(), "conv_cfg": set()}
    for node in ast.walk(model) if model else ():
        if isinstance(node, ast.keyword) and node.arg in found:
            for call in ast.walk(node.value):
                options = {k.arg: k.value for k in getattr(call, "keywords", ())}
                if isinstance(options.get("type"), ast.Constant):
                    found[node.arg].add(str(options["type"].value))
    kinds = [" and ".join(sorted(names)) for names in found.values() if names]
    return ", convolutions ".join(kinds) or "unknown"


def summary(checkpoint: Mapping[str, Any], state: State) -> dict[str, str]:
    """What a checkpoint is, as label -> text."""
    meta = checkpoint.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    dtypes = Counter(str(v.dtype).removeprefix("torch.") for v in state.values())
    classes = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or ()
    rows = {
        "holds": ", ".join(map(str, checkpoint)) if "state_dict" in checkpoint else "a state dict",
        "tensors": f"{len(state)} ({', '.join(f'{n} {k}' for k, n in dtypes.most_common())})",
        "parameters": f"{num_parameters(state):,}",
        "norms by entries": "; ".join(f"{n} {k}" for k, n in norm_kinds(state).items()) or "none",
        "norms by config": config_layers(str(meta.get("cfg", ""))),
        "classes": f"{len(classes)}: {', '.join(map(str, classes))}" if len(classes) else "unknown",
    }
    for key in (*_META, *_HISTORY):
        if meta.get(key) is not None:
            value = meta[key]
            rows[key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if "mmengine_version" in rows:  # mmengine glues the commit of the current folder to it
        version = rows["mmengine_version"]
        rows["mmengine_version"] = re.sub("([0-9a-f]{7})[0-9a-f]{33}$", r", commit \1", version)
    return rows


def differences(first: State, second: State) -> tuple[list[Difference], list[str]]:
    """The tensors that differ in value, and what cannot be compared."""
    changed, others = [], []
    for key, value in first.items():
        if key not in second:
            others.append(f"{key}: only in the first")
            continue
        if value.shape != second[key].shape:
            shapes = " and ".join("x".join(map(str, v.shape)) for v in (value, second[key]))
            others.append(f"{key}: {shapes}")
            continue
        if value.dtype != second[key].dtype:
            dtypes = " and ".join(str(v.dtype).removeprefix("torch.") for v in (value, second[key]))
            others.append(f"{key}: {dtypes}")
        a, b = value.double(), second[key].double()
        if not torch.equal(a.nan_to_num(0), b.nan_to_num(0)) or not torch.equal(
            a.isnan(), b.isnan()
        ):
            largest = float((a - b).abs().max())
            relative = float((a - b).norm() / a.norm())
            changed.append(Difference(key, largest, relative))
    others += [f"{key}: only in the second" for key in second if key not in first]
    return changed, others
