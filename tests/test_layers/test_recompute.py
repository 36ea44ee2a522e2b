"""Activation checkpointing must change neither outputs nor gradients nor statistics."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmbcn import BCN, MicroBCN, SyncBCN

LAYERS = [BCN, MicroBCN, SyncBCN]


def block(cls):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), cls(6, num_groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ).double()
    with torch.no_grad():
        for p in net[1].parameters():
            p.uniform_(0.5, 1.5)
    return net


def inputs(count, size=5):
    torch.manual_seed(1)
    return [
        (torch.randn(2, 4, size, size, dtype=torch.float64) + i).requires_grad_()
        for i in range(count)
    ]


def result(net, xs, call):
    """Forward all inputs, then one backward; afterwards everything that may differ."""
    xs = [x.detach().clone().requires_grad_() for x in xs]
    outputs = [call(net, x) for x in xs]
    sum((i + 1) * y.square().sum() for i, y in enumerate(outputs)).backward()
    return {
        **{f"y{i}": y.detach() for i, y in enumerate(outputs)},
        **{f"dx{i}": x.grad for i, x in enumerate(xs)},
        **{f"d {k}": p.grad for k, p in net.named_parameters()},
        **{k: b.clone() for k, b in net.named_buffers()},
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("passes", [1, 2, 5])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cls", LAYERS)
def test_checkpointing_changes_nothing(cls, reentrant, passes):
    net, xs = block(cls), inputs(passes)
    expected = result(copy.deepcopy(net), xs, lambda m, x: m(x))
    assert expected["1.bn.num_batches_tracked"] == passes
    got = result(net, xs, lambda m, x: checkpoint(m, x, use_reentrant=reentrant))
    assert_same(got, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cls", LAYERS)
def test_several_steps(cls, reentrant):
    plain, saved = block(cls), block(cls)
    for step in range(3):
        (x,) = inputs(1, size=4 + step)
        for net in (plain, saved):
            net.zero_grad()
        expected = result(plain, [x], lambda m, x: m(x))
        assert_same(
            result(saved, [x], lambda m, x: checkpoint(m, x, use_reentrant=reentrant)), expected
        )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cls", LAYERS)
def test_frozen_statistics(cls, reentrant):
    net, xs = block(cls), inputs(2)
    net[1].bn.eval()
    expected = result(copy.deepcopy(net), xs, lambda m, x: m(x))
    assert_same(result(net, xs, lambda m, x: checkpoint(m, x, use_reentrant=reentrant)), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cls", [BCN, SyncBCN])
def test_one_value_per_channel_between_updates(cls, reentrant):
    """BCN falls back to its estimates; the repeat must see those from before the other pass."""
    xs = [x.detach() for x in inputs(2)]
    xs[0] = xs[0][:1, :, :1, :1]
    net = block(cls)
    net[0] = nn.Conv2d(4, 6, 1).double()
    expected = result(copy.deepcopy(net), xs, lambda m, x: m(x))
    assert_same(result(net, xs, lambda m, x: checkpoint(m, x, use_reentrant=reentrant)), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_micro_with_equal_inputs(reentrant):
    """Two passes on one input see different estimates: the repeats come newest first."""
    net, (x,) = block(MicroBCN), inputs(1)
    y = checkpoint(net, x, use_reentrant=reentrant)
    plain = block(MicroBCN)
    x_plain = x.detach().clone().requires_grad_()
    y_plain = plain(x_plain)
    torch.testing.assert_close(y, y_plain, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    y_plain.square().sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-11, atol=1e-11)
