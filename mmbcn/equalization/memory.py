"""What optimizers remember of a weight, and how it goes with the weight's scale."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from mmbcn.errors import UsageError

# what optimizers keep for each weight -> the power of the weight that it goes with
_STATE_POWERS = {
    **dict.fromkeys(("momentum_buffer", "exp_avg"), -1),  # gradients
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq"), -2),  # squares of gradients
}


def check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Check, before it has any, that what an optimizer will keep is known.

    Raises:
        UsageError: it is another one.
    """
    if not isinstance(optimizer, (SGD, Adam, AdamW)):
        raise UsageError(
            f"ENormHook does not know how what {type(optimizer).__name__} remembers goes with "
            "the scale of weights: use SGD, Adam or AdamW"
        )


def with_memory(
    parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[Tensor, int]]:
    """A parameter and what the optimizer keeps for it, with the powers of the scale.

    Raises:
        UsageError: the optimizer keeps something that is not known.
    """
    yield parameter, 1
    state = optimizer.state.get(parameter, {}) if optimizer else {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.shape != parameter.shape:
            continue
        if key not in _STATE_POWERS:
            raise UsageError(
                f"equalization does not know how {type(optimizer).__name__}'s {key!r} goes with "
                "the scale of weights: use SGD, Adam or AdamW"
            )
        yield value, _STATE_POWERS[key]
