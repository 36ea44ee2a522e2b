"""Fits a checkpoint to a model: renames, converts, compares, reports. Loads nothing itself."""

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmbcn.checkpoints.guard import config_norms, norm_layers, parse_model, state_mismatch
from mmbcn.checkpoints.key_maps import State, find_state, map_keys
from mmbcn.checkpoints.report import LoadReport, is_classifier
from mmbcn.checkpoints.standardization import (
    Formula,
    change_formula,
    formula_by_origin,
    formula_in_config,
    formula_of,
)
from mmbcn.errors import UsageError
from mmbcn.layers import BatchChannelNorm
from mmbcn.layers.foreign_state import adopt_state

_COUNTER = "num_batches_tracked"
_BATCH_NORM_ONLY = ("running_mean", "running_var", _COUNTER)


def fit_checkpoint(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    source: str = "the checkpoint",
    *,
    prefix: str | None = None,
    config: str | None = None,
    exact: bool = False,
    optional: Iterable[str] = (),
    allow_partial: bool | None = False,
) -> tuple[State, LoadReport]:
    """The entries of a checkpoint that ``model`` takes, under its names and in its shapes.

    Args:
        model: a segmentor, a backbone, or any module; not changed.
        checkpoint: the content of a file.
        source: the file's name, for messages.
        prefix: use only the entries that begin with it.
        config: text of the model's config, compared with the checkpoint's where it has one.
        exact: testing and resuming: the same function, nothing may be missing.
        optional: with ``exact``, parts of the model that may be missing.
        allow_partial: report what does not match instead of raising; None: nor say that one could.

    Raises:
        UsageError: the norm is another (with ``exact``, or where the group stage of a
            batch-channel norm would be dropped), or too little matches.
    """
    state = find_state(checkpoint, source, prefix)
    stored = str((checkpoint.get("meta") or {}).get("cfg", ""))
    formula = _formula(stored, state, source)
    state, converted, left_out = map_keys(model, state)
    report = LoadReport(source, type(model).__name__, converted=converted, left_out=left_out)
    _compare_norms(model, state, report, stored, config, exact)
    spare = [k for k in state if _is_spare(k, model)]
    if spare:
        report.converted["statistics dropped: the model's norm keeps none"] = len(spare)
    state = {k: v for k, v in state.items() if k not in spare}
    _convert_norms(model, state, report)
    _convert_standardization(model, state, report, formula, known_config=bool(stored))
    state = _compare(model, state, report)
    problem = report.problem(exact, optional)
    if problem and not allow_partial:
        advice = "To go on with what matches: --allow-partial (allow_partial=True in a config)"
        if allow_partial is None:
            advice = "Give the config that it was trained with (saved beside it)"
        raise UsageError(
            f"{source} does not fit the model: {problem}. {report.hint()}{advice}\n{report.text()}"
        )
    return state, report


def _formula(stored: str, state: State, source: str) -> Formula | None:
    tree = parse_model(stored) if stored else None
    return formula_in_config(tree) if tree else formula_by_origin(state, Path(source).name)


def _compare_norms(
    model: nn.Module,
    state: State,
    report: LoadReport,
    stored: str,
    config: str | None,
    exact: bool,
) -> None:
    """Stop on another norm where the function must be the same; else note it."""
    difference = state_mismatch(model, state)
    if difference:
        layer, ours, theirs = difference
        text = f"{layer} is a {ours} in the model and {theirs} in the checkpoint"
    else:
        kinds = config_norms(stored), config_norms(config or "")
        if None in kinds or kinds[0] == kinds[1]:
            return
        theirs, ours = (" with ".join(sorted(k)) or "none" for k in kinds)
        text = f"the model has {ours}, the checkpoint was trained with {theirs}"
    if exact or theirs == "batch-channel norm":
        raise UsageError(
            f"the checkpoint is of another norm than the config: {text}. Give the config that "
            f"it was trained with (saved beside it), or the same --norm ({report.source})"
        )
    report.notes.append(f"starting from a checkpoint of another norm: {text}")


def _is_spare(key: str, model: nn.Module) -> bool:
    """Whether an entry holds BatchNorm's statistics for a norm that keeps none."""
    path, _, name = key.rpartition(".")
    if name not in _BATCH_NORM_ONLY:
        return False
    try:
        layer = model.get_submodule(path)
    except AttributeError:
        return False
    return isinstance(layer, nn.GroupNorm) and not isinstance(layer, BatchChannelNorm)


def _convert_norms(model: nn.Module, state: State, report: LoadReport) -> None:
    for path, layer in norm_layers(model):
        if isinstance(layer, BatchChannelNorm):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the report says it
                how = adopt_state(state, f"{path}.", layer.num_groups, layer.bn)
            if how:
                report.converted[how] += 1


def _convert_standardization(
    model: nn.Module,
    state: State,
    report: LoadReport,
    theirs: Formula | None,
    known_config: bool,
) -> None:
    """Rescale raw weights where the formulas differ; note what cannot be told."""
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    convs = {n: m for n, m in convs.items() if f"{n}.weight" in state}
    standardizing = any(formula_of(m) for m in convs.values())
    if theirs is None:
        if standardizing and not known_config:
            ours = next(f for f in map(formula_of, convs.values()) if f)
            report.notes.append(
                f"the model standardizes weights by {ours}; the checkpoint does not say whether "
                "it does: its weights are taken as they are"
            )
        return
    for name, conv in convs.items():
        ours = formula_of(conv)
        if ours == theirs or (ours is None and (standardizing or name.endswith("conv_seg"))):
            continue
        key = f"{name}.weight"
        changed = change_formula(state[key], theirs, ours)
        if changed is None:
            report.notes.append(f"{key}: no raw weights give by {ours} what they give by {theirs}")
            continue
        state[key] = changed
        how = f"rescaled for {ours}" if ours else "standardized, as the model does not"
        report.converted[f"weights standardized by {theirs} {how}"] += 1


def _compare(model: nn.Module, state: State, report: LoadReport) -> State:
    """Sort the entries into the report; returns those that fit."""
    ours: dict[str, Tensor] = model.state_dict()
    fitting: State = {}
    for key, value in state.items():
        if key not in ours:
            (report.left_out if is_classifier(key) else report.unexpected).append(key)
        elif value.shape != ours[key].shape:
            report.shapes[key] = tuple(value.shape), tuple(ours[key].shape)
        else:
            fitting[key] = value
    report.matched = list(fitting)
    report.missing = [k for k in ours if k not in state and not k.endswith(_COUNTER)]
    parts = dict(model.named_children())
    if "backbone" in parts and all(k.startswith("backbone.") for k in report.unexpected):
        started = {k.partition(".")[0] for k in state} | {"backbone"}
        with_weights = {k.partition(".")[0] for k in ours} - started
        report.absent = [k for k in parts if k in with_weights]
    _count_unmatched(model, state, report)
    return fitting


def _count_unmatched(model: nn.Module, state: State, report: LoadReport) -> None:
    """Norm layers that are not whole, and the shares of the backbone without a counterpart."""
    lost = {*report.missing, *report.shapes}
    for path, layer in norm_layers(model):
        names = {f"{path}.{k}" for k in layer.state_dict()}
        if not names & lost:
            report.norms += 1
        elif path.partition(".")[0] not in report.absent:
            report.norms_unmatched.append(path)
    parts = dict(model.named_children())
    start = "backbone." if "backbone" in parts else ""
    stages = tuple(f"{start}{k}." for k, _ in parts.get("backbone", model).named_children())
    heads = tuple(f"{k}." for k in parts if k != "backbone")
    report.surplus = [k for k in report.unexpected if k.startswith(stages + heads)]
    sizes = {k: p.numel() for k, p in model.named_parameters() if k.startswith(start)}
    total = max(sum(sizes.values()), 1)
    lacking = sum(v for k, v in sizes.items() if k in lost)
    spare = {k: state[k] for k in report.surplus if k.startswith(stages)}
    report.norms_unmatched += _norm_paths(spare)
    more = sum(v.numel() for v in spare.values())
    report.backbone_unmatched = max(lacking / total, more / (total + more))


def _norm_paths(state: State) -> list[str]:
    """The norm layers in a checkpoint: those with one weight for each channel or group."""
    found = [k.removesuffix(".weight") for k, v in state.items() if _is_affine(k, v)]
    return list(dict.fromkeys(re.sub(r"\.p?bn$", "", path) for path in found))


def _is_affine(key: str, value: Tensor) -> bool:
    return key.endswith(".weight") and value.numel() == max(value.shape, default=0)
