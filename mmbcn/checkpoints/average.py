"""Averages the weights of several checkpoints.

Stochastic weight averaging (Izmailov et al. 2018, https://arxiv.org/abs/1803.05407) after the
fact. Averaged weights give other activations, so running statistics need to be measured anew:
`mmbcn.analysis.calibrate`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmbcn.checkpoints.guard import config_norms
from mmbcn.checkpoints.key_maps import State, find_state
from mmbcn.errors import UsageError

_EMA = "ema_state_dict"
_SHOWN = 6


def average_checkpoints(
    checkpoints: Iterable[tuple[str, Mapping[str, Any]]], ema: bool = False
) -> dict[str, Any]:
    """The mean of the weights of several checkpoints, with the last one's meta.

    Sums are in float64; what is no floating point (counters) is the last one's. No more than two
    of the checkpoints are held at a time.

    Args:
        checkpoints: names and contents of the files; at least one with ``ema``, else two.
        ema: the weights averaged by mmengine's ``EMAHook``, refusing checkpoints without. When
            saving, the hook exchanges the two: the averaged ones stand under ``state_dict``, and
            the trained ones, for resuming, under ``ema_state_dict``.

    Raises:
        UsageError: too few checkpoints, or they differ in keys, shapes or normalization, or hold
            non-finite values; named.
    """
    total: State = {}
    last: State = {}
    names: list[str] = []
    first_norms = None
    for name, checkpoint in checkpoints:
        if ema and _EMA not in checkpoint:
            raise UsageError(
                f"{name} holds no EMA weights: mmengine's EMAHook would have stored {_EMA!r}, "
                f"found the keys {', '.join(map(str, list(checkpoint)[:8]))}"
            )
        state = find_state(checkpoint, name)
        meta = dict(checkpoint.get("meta") or {})
        norms = config_norms(str(meta.get("cfg", "")))
        if names:
            _compare(names[0], last, name, state)
            _compare_norms(names[0], first_norms, name, norms)
        first_norms = norms if first_norms is None else first_norms
        _add(total, state, name)
        names.append(name)
        last = state
    if len(names) < (1 if ema else 2):
        raise UsageError(
            f"averaging needs at least two checkpoints, got {len(names)}; or one with --ema"
        )
    state = {k: (total[k] / len(names)).to(v.dtype) if k in total else v for k, v in last.items()}
    return {"meta": {**meta, "averaged": names}, "state_dict": state}


def holds_ema(checkpoint: Mapping[str, Any]) -> bool:
    """Whether mmengine's ``EMAHook`` saved it, so that ``state_dict`` holds averaged weights."""
    return _EMA in checkpoint


def _add(total: State, state: State, name: str) -> None:
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        if not value.isfinite().all():
            raise UsageError(f"{name} has non-finite values in {key}: leave it out of the average")
        if key in total:
            total[key] += value
        else:
            total[key] = value.to(torch.float64, copy=True)


def _compare(first: str, known: State, name: str, state: State) -> None:
    lacking = [k for k in known if k not in state]
    more = [k for k in state if k not in known]
    both = [k for k in known if k in state]
    other = [
        f"{k} ({_form(known[k])} and {_form(state[k])})"
        for k in both
        if known[k].shape != state[k].shape
        or known[k].is_floating_point() != state[k].is_floating_point()
    ]
    texts = [
        f"{text} {_cut(keys)}"
        for text, keys in (
            ("it lacks", lacking),
            ("it also has", more),
            ("of another form:", other),
        )
        if keys
    ]
    if texts:
        raise UsageError(f"{name} is of another model than {first}: {'; '.join(texts)}")


def _compare_norms(first: str, known: set[str] | None, name: str, norms: set[str] | None) -> None:
    if known is not None and norms is not None and known != norms:
        theirs, ours = (" with ".join(sorted(n)) or "no norm" for n in (known, norms))
        raise UsageError(
            f"{name} was trained with {ours}, {first} with {theirs}: their average means nothing"
        )


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _cut(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f", ... ({len(items)})" if len(items) > _SHOWN else "")
