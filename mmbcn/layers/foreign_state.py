"""Reads the state of other norms, and of the original code, into a batch-channel norm.

=====================  ==========================================================================
found under a layer    what is done
=====================  ==========================================================================
``bn.*``, ``weight``   ours, or the original code's (affine of shape (1, G, 1)): taken as it is
``pbn.*``, ``weight``  the original code's other name of the batch stage: the same
BatchNorm              affine and statistics go to the batch stage; the group affine is 1 and 0
GroupNorm, others      the per-channel affine goes to the batch stage, the group affine is 1 and
without statistics     0 and the statistics stay: *not* the same function (it acts before the
                       group normalization instead of after it), so a warning says so
=====================  ==========================================================================
"""

import warnings
from collections.abc import MutableMapping

import torch
from torch import Tensor, nn

_PER_CHANNEL = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def adopt_state(
    state: MutableMapping[str, Tensor], prefix: str, num_groups: int, bn: nn.Module
) -> str | None:
    """Rename and reshape, in place, what ``state`` holds under ``prefix``.

    Args:
        state: a state dict.
        prefix: the layer's prefix in it, with the dot.
        num_groups: length of the group affine.
        bn: the layer's batch stage.

    Returns:
        What was done; None where the entries are ours.
    """
    renamed = [k.removeprefix(prefix) for k in state if k.startswith(prefix + "pbn.")]
    for name in renamed:
        state[f"{prefix}bn.{name.removeprefix('pbn.')}"] = state.pop(prefix + name)
    state.pop(
        f"{prefix}bn.estbn_moving_speed", None
    )  # the original's update rate, set from outside
    affine = [f"{prefix}weight", f"{prefix}bias"]
    if any(k.startswith(f"{prefix}bn.") for k in state):
        reshaped = [k for k in affine if k in state and state[k].shape == (1, num_groups, 1)]
        for key in reshaped:
            state[key] = state[key].reshape(num_groups)
        done = ["pbn -> bn"] * bool(renamed) + ["group affine (1, G, 1) -> (G,)"] * bool(reshaped)
        return ", ".join(done) or None
    found = [name for name in _PER_CHANNEL if prefix + name in state]
    if not found:
        return None
    example = state[prefix + found[0]]
    for name in found:
        state[f"{prefix}bn.{name}"] = state.pop(prefix + name)
    state[affine[0]] = torch.ones(num_groups, dtype=example.dtype, device=example.device)
    state[affine[1]] = torch.zeros(num_groups, dtype=example.dtype, device=example.device)
    if "running_mean" not in found:
        warnings.warn(
            "Loading the per-channel affine of a norm without running statistics (GroupNorm, "
            "LayerNorm, InstanceNorm) into the batch stage of a batch-channel norm. This is an "
            "initialization, not the same function: there it acts before the group normalization.",
            stacklevel=2,
        )
        for name in _PER_CHANNEL:
            state.setdefault(f"{prefix}bn.{name}", getattr(bn, name).detach().clone())
        return "per-channel affine -> batch stage, only an initialization"
    return "BatchNorm -> batch stage, group affine 1 and 0"
