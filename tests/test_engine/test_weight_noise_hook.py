"""Validation and test with noisy weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")

from mmbcn.analysis import WeightNoise
from mmbcn.engine import WeightNoiseHook
from mmbcn.errors import UsageError
from mmbcn.registry import HOOKS


def test_is_registered_and_restores_before_others_save():
    hook = HOOKS.build(dict(type="mmbcn.WeightNoiseHook", kind="additive", level=0.1))
    assert hook.priority == "VERY_HIGH"


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("fresh", [False, True])
def test_iterations_are_noisy_and_what_is_between_is_not(split, fresh):
    torch.manual_seed(0)
    model, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    clean = model.weight.detach().clone()
    with WeightNoise(model, "lognormal", 0.2, seed=3):
        expected = model(x)
    hook, runner = WeightNoiseHook("lognormal", 0.2, seed=3, fresh=fresh), SimpleNamespace()
    runner.model = model
    before, after = (getattr(hook, f"{when}_{split}_iter") for when in ("before", "after"))
    for _ in range(2):  # epochs
        outputs = []
        for index in range(3):
            before(runner, index)
            outputs.append(model(x))
            after(runner, index)
            assert torch.equal(model.weight, clean)
        assert torch.equal(outputs[0], expected)
        assert torch.equal(outputs[1], expected) != fresh


def test_epoch_that_broke_off_leaves_no_noise_in_the_next():
    model = nn.Conv2d(3, 4, 3)
    clean = model.weight.detach().clone()
    hook, runner = WeightNoiseHook("additive", 0.2), SimpleNamespace(model=model)
    hook.before_val_iter(runner, 0)
    first = model.weight.detach().clone()
    hook.before_val_iter(runner, 0)
    assert torch.equal(model.weight, first)
    hook.after_val_iter(runner, 0)
    assert torch.equal(model.weight, clean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kind="gauss", level=0.1), "unknown noise 'gauss'"),
        (dict(kind="additive", level="0.1"), "must be 0 or more, and finite, got '0.1'"),
        (dict(kind="additive", level=0.1, seed=-1), "seed must be a whole number"),
    ],
)
def test_wrong_settings_are_refused_before_training(settings, message):
    with pytest.raises(UsageError, match=message):
        WeightNoiseHook(**settings)
