"""The layer that stands where a norm would."""

import pytest
import torch
from torch import nn

from mmbcn import convert_norm
from mmbcn.layers import NoNorm


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 5, 7), (1, 3, 1, 1)])
def test_is_a_factor_and_a_shift(shape):
    layer = NoNorm(3).double()
    layer.weight.data.fill_(1.5)
    layer.bias.data = torch.tensor([1.0, -2.0, 0.5]).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = x.detach().numpy().copy()
    for c, shift in enumerate((1.0, -2.0, 0.5)):
        expected[:, c] = expected[:, c] * 1.5 + shift
    torch.testing.assert_close(layer(x), torch.from_numpy(expected))
    assert torch.autograd.gradcheck(layer, (x,))


def test_residual_branches_begin_at_zero_and_learn():
    resnet = pytest.importorskip("mmseg.models.backbones").ResNet
    model = resnet(18, base_channels=4, stem_channels=4, norm_cfg=dict(type="mmbcn.NoNorm"))
    model.init_weights()
    block = model.layer1[0]
    assert (block.bn1.weight.item(), block.bn2.weight.item()) == (1, 0)
    x = torch.rand(1, 4, 8, 8)
    torch.testing.assert_close(block(x), x)
    model(torch.randn(2, 3, 32, 32))[-1].square().sum().backward()
    assert block.bn2.weight.grad.abs() > 0


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_converts_from_a_norm_and_back(value):
    norm = nn.BatchNorm2d(4)
    norm.weight.data.fill_(value)
    norm.bias.data = torch.arange(4.0)
    layer = convert_norm(norm, "none")
    assert type(layer) is NoNorm
    assert layer.weight.tolist() == [value]
    assert layer.bias.tolist() == [0, 1, 2, 3]
    back = convert_norm(layer, "bn")
    assert back.weight.tolist() == [value] * 4
    assert back.bias.tolist() == [0, 1, 2, 3]
    assert convert_norm(NoNorm(4), "bcn").bn.weight.tolist() == [1] * 4
