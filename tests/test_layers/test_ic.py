"""The independent-component layer: what it is in the limits, and what it does to correlations."""

import copy

import pytest
import torch
from torch import nn

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


@pytest.mark.parametrize("rate", [-0.1, 1, "0.1", float("nan")])
def test_drop_rate_is_checked(rate):
    with pytest.raises(ValueError, match="drop_rate must be a number in"):
        IC(4, rate)


def test_inner_norm_is_one_for_those_who_look_for_batch_norms():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(IC(4))
    assert type(layer.bn) is nn.SyncBatchNorm
    assert layer.drop.p == 0.05
