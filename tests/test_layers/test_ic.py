"""The independent-component layer: what it is in the limits, and what it does to correlations."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmbcn.layers import IC


def pair(drop_rate):
    """An IC layer and BatchNorm with the same random state, in float64."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(5, eps=1e-3, momentum=0.3).double()
    for tensor in (bn.weight.data, bn.bias.data, bn.running_mean, bn.running_var):
        tensor.uniform_(0.5, 2)
    layer = IC(5, drop_rate, eps=1e-3, momentum=0.3).double()
    layer.bn.load_state_dict(copy.deepcopy(bn.state_dict()))
    return layer, bn


def check(layer, bn):
    x = torch.randn(3, 5, 4, 7, dtype=torch.float64) * 3 + 2
    grad = torch.randn_like(x)
    results = []
    for module in (layer, bn):
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        gradients = torch.autograd.grad(out, [inputs, *module.parameters()], grad)
        results.append([out, *gradients, *module.buffers()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_without_dropout_it_is_batch_norm():
    check(*pair(0.0))


def test_in_eval_it_is_batch_norm():
    layer, bn = pair(0.5)
    check(layer.eval(), bn.eval())


@pytest.mark.parametrize(("keep", "correlation"), [(0.95, 0.9), (0.5, -0.6)])
def test_dropout_scales_correlations_by_the_share_that_is_kept(keep, correlation):
    torch.manual_seed(0)
    one, noise = torch.randn(2, 400_000, dtype=torch.float64)
    two = correlation * one + (1 - correlation**2) ** 0.5 * noise
    x = (torch.stack([one, two]) * 3 + 1).view(1, 2, 1000, 400)
    y = IC(2, 1 - keep).double()(x)
    found = torch.corrcoef(y.view(2, -1))[0, 1].item()
    assert found == pytest.approx(keep * correlation, abs=5e-3)
    assert y.count_nonzero().item() / y.numel() == pytest.approx(keep, abs=5e-3)


def test_default_is_the_papers():
    assert IC(4).drop.p == 0.05


@pytest.mark.parametrize("rate", [-0.1, 1, "0.1", float("nan"), False])
def test_drop_rate_is_checked(rate):
    with pytest.raises(ValueError, match="drop_rate must be a number in"):
        IC(4, rate)


def test_other_arguments_are_checked_as_in_all_norms():
    with pytest.raises(TypeError, match=r"num_features must be an int, got 4\.0"):
        IC(4.0)
    with pytest.raises(ValueError, match="num_features must be at least 1, got 0"):
        IC(0)
    with pytest.raises(ValueError, match="eps must be finite and greater than 0, got -1"):
        IC(4, eps=-1)
    with pytest.raises(ValueError, match=r"momentum is the weight of the new value.*got 2"):
        IC(4, momentum=2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_recomputation_changes_nothing(reentrant, frozen, momentum):
    """Neither the statistics, nor outputs and gradients; frozen, by those of before."""
    layer = IC(5, 0.3, momentum=momentum).double()
    layer.bn.running_mean.uniform_(), layer.bn.running_var.uniform_(1, 2)
    layer.bn.train(not frozen)
    results = []
    for run in (lambda m, x: checkpoint(m, x, use_reentrant=reentrant), lambda m, x: m(x)):
        module = copy.deepcopy(layer)
        torch.manual_seed(1)
        x = torch.randn(3, 5, 4, 7, dtype=torch.float64, requires_grad=True)
        for step in range(2):
            out = run(module, x * (step + 1))
            out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert results[0][-1] == (0 if frozen else 2)


def test_inner_norm_is_one_for_those_who_look_for_batch_norms():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(IC(4))
    assert type(layer.bn) is nn.SyncBatchNorm
    assert layer.drop.p == 0.05
