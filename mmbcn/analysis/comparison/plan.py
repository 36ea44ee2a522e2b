"""What is trained in a comparison: the runs, and the rules that make them equal."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmbcn.errors import UsageError

EQUAL = ("iterations", "images")
LR_RULES = ("linear", "sqrt", "constant")
_EXPONENT = dict(linear=1.0, sqrt=0.5, constant=0.0)  # of the batch size's ratio


@dataclass(frozen=True)
class Run:
    """One training: what differs between the runs of a comparison.

    Attributes:
        norm: name of the normalization.
        batch_size: images per iteration.
        lr: learning rate that the schedule begins with.
        seed: of weights, data order, augmentation and dropout.
        iters: iterations.
    """

    norm: str
    batch_size: int
    lr: float
    seed: int
    iters: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.norm}-b{self.batch_size}-lr{self.lr:g}-s{self.seed}"

    @property
    def images(self) -> int:
        """Images seen in training."""
        return self.iters * self.batch_size


@dataclass(frozen=True)
class Rules:
    """What a comparison compares, and what it holds equal.

    Attributes:
        norms: names of normalizations.
        batch_sizes: images per iteration.
        seeds: number of seeds, from 0 on.
        iters: iterations at the config's batch size; None: as many as in the config.
        equal: ``'iterations'``: every run has as many; ``'images'``: every run sees as many images,
            so it has fewer iterations the larger its batch.
        lr_rule: how the config's learning rate follows the batch size: ``'linear'``, ``'sqrt'`` or
            ``'constant'``.
        lrs: learning rates, all of which are tried with every norm and batch size, in place of the
            rule; None: the rule.
    """

    norms: Sequence[str]
    batch_sizes: Sequence[int]
    seeds: int
    iters: int | None = None
    equal: str = "iterations"
    lr_rule: str = "linear"
    lrs: Sequence[float] | None = None

    def describe(self) -> dict[str, Any]:
        """The rules as plain values, for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def make_plan(cfg: Mapping[str, Any], rules: Rules) -> list[Run]:
    """The runs of a comparison, one seed after the other: what ends early has whole seeds.

    Raises:
        UsageError: the rules name nothing, or something unknown, or the config cannot be compared.
    """
    _check(rules)
    base_iters, base_batch, base_lr = _base(cfg)
    iters = rules.iters or base_iters
    runs = []
    for seed in range(rules.seeds):
        for batch in rules.batch_sizes:
            ratio = batch / base_batch
            number = max(1, round(iters / ratio)) if rules.equal == "images" else iters
            lrs = rules.lrs or [base_lr * ratio ** _EXPONENT[rules.lr_rule]]
            for lr in lrs:
                runs += [Run(norm, batch, float(f"{lr:.6g}"), seed, number) for norm in rules.norms]
    if len(set(runs)) < len(runs):
        raise UsageError("--lrs are too much alike: the runs of two would have the same names")
    return runs


def _base(cfg: Mapping[str, Any]) -> tuple[int, int, float]:
    """Iterations, batch size and learning rate of the config."""
    loop = cfg["train_cfg"]
    if "max_iters" not in loop:
        raise UsageError(
            "the config trains for epochs; a comparison needs a config that trains for iterations: "
            "train_cfg=dict(type='IterBasedTrainLoop', max_iters=...)"
        )
    batch = cfg["train_dataloader"].get("batch_size")
    rate = cfg["optim_wrapper"].get("optimizer", {}).get("lr")
    if not batch or not rate:
        raise UsageError(
            "the config gives no train_dataloader.batch_size or no optim_wrapper.optimizer.lr, "
            "which the runs of a comparison are derived from"
        )
    return loop["max_iters"], batch, rate


def _check(rules: Rules) -> None:
    for key in ("norms", "batch_sizes", "lrs"):
        values = getattr(rules, key)
        if values is None:
            continue
        option = "--" + key.replace("_", "-")
        if not values:
            raise UsageError(f"{option} is empty: give at least one")
        if len(set(values)) < len(values):
            raise UsageError(f"{option} names one twice: {','.join(map(str, values))}")
    for option, numbers in (
        ("--batch-sizes", rules.batch_sizes),
        ("--seeds", [rules.seeds]),
        ("--iters", [1 if rules.iters is None else rules.iters]),
        ("--lrs", rules.lrs or [1]),
    ):
        wrong = [number for number in numbers if not 0 < number < math.inf]
        if wrong:
            raise UsageError(f"{option} must be above 0, got {wrong[0]}")


def split_list(text: str) -> list[str]:
    """The items of a comma-separated list."""
    return [item for item in re.split(r"[,\s]+", text) if item]
