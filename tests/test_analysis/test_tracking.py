"""Statistics that follow the test images, against weighted moments of all values."""

import pytest
import torch
from torch import nn

from mmbcn import BCN, MicroBCN, SyncBCN
from mmbcn.analysis import calibrate, track
from mmbcn.errors import UsageError

LAYERS = {
    "bn": lambda: nn.BatchNorm2d(4),
    "syncbn": lambda: nn.SyncBatchNorm(4),
    "bcn": lambda: BCN(4, 2),
    "syncbcn": lambda: SyncBCN(4, 2),
    "microbcn": lambda: MicroBCN(4, 2),
}


def stage(layer):
    return layer.bn if hasattr(layer, "bn") else layer


def batches(number=7):
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 4, 3, 5, generator=g, dtype=torch.float64) * (i + 1) + i
        for i in range(number)
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_equals_moments_weighted_by_age(name):
    """From mean 0 and variance 1 on, as one value pair of 1 and -1 that all began with."""
    layer = LAYERS[name]().double().eval()
    data, a = batches(), 0.3
    weights = [a * (1 - a) ** (len(data) - 1 - i) for i in range(len(data))]
    start = (1 - a) ** len(data)
    with torch.no_grad(), track(layer, a):
        for x in data:
            layer(x)
    values = [x.transpose(0, 1).reshape(4, -1) for x in data]
    mean = sum(w * v.mean(1) for w, v in zip(weights, values, strict=True))
    square = start * 1.0 + sum(w * v.square().mean(1) for w, v in zip(weights, values, strict=True))
    torch.testing.assert_close(stage(layer).running_mean, mean)
    torch.testing.assert_close(stage(layer).running_var, square - mean.square())


def test_batch_is_normalized_with_the_moved_statistics():
    layer = nn.BatchNorm2d(4, affine=False).double().eval()
    [x] = batches(1)
    with track(layer, 1.0):
        y = layer(x)
    torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, training=True))


def test_weight_one_on_one_batch_is_calibration():
    """Up to the biased variance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), BCN(6, 2), nn.ReLU(), nn.Conv2d(6, 4, 1), BCN(4, 2))
    model = model.double().eval()
    [x] = batches(1)
    with torch.no_grad(), track(model, 1.0):
        tracked = model(x)
    calibrate(model, [x])
    for m in (model[1].bn, model[4].bn):
        values = 2 * 1 * 3
        m.running_var.mul_((values - 1) / values)
    torch.testing.assert_close(model.eval()(x), tracked)


def test_single_value_counts_by_its_distance():
    layer = BCN(4, 2).double().eval()
    with torch.no_grad(), track(layer, 0.5):
        layer(torch.full((1, 4, 1, 1), 2.0, dtype=torch.float64))
    assert layer.bn.running_mean.eq(1).all()
    assert layer.bn.running_var.eq(0.5 * 1 + 0.25 * 4).all()


def test_training_layers_and_what_comes_after_are_left_alone():
    layer = nn.BatchNorm2d(4).double().train()
    other = nn.BatchNorm2d(4).double().train()
    with track(layer, 0.5):
        layer(batches(1)[0])
    other(batches(1)[0])
    assert torch.equal(layer.running_mean, other.running_mean)
    before = layer.eval().running_mean.clone()
    layer(batches(2)[1])
    assert torch.equal(layer.running_mean, before)


def test_mistakes_say_what_to_do():
    for momentum in (0.0, 1.1, float("nan")):
        with pytest.raises(UsageError, match="must be above 0 and"), track(BCN(4, 2), momentum):
            pass
    with pytest.raises(UsageError, match="GroupNorm has no layer"), track(nn.GroupNorm(1, 4)):
        pass
