"""The batch-channel norms against oracles that share no code with them.

Outputs: slow float64 numpy loops over channels, samples and groups. Gradients: torch autograd in
float64 through ``F.batch_norm`` and ``F.group_norm`` with a per-group affine behind it, and finite
differences (``gradcheck``).
"""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbcn import BCN, MicroBCN, SyncBCN

EPS = 1e-5
LAYERS = [BCN, MicroBCN, SyncBCN]
SHAPES = [
    ((2, 6, 5, 7), 3),
    ((1, 6, 4, 3), 2),
    ((3, 8), 2),
    ((2, 6, 5), 3),
    ((2, 4, 2, 3, 2), 2),
]
IDS = ["2d", "one_sample", "no_position", "1d", "3d"]
DOUBLE = dict(rtol=1e-10, atol=1e-10)


def make(cls, channels, groups, dtype=torch.float64, seed=0, **kwargs):
    """A layer whose parameters and estimates are all different from their defaults."""
    g = torch.Generator().manual_seed(seed)
    layer = cls(channels, num_groups=groups, **kwargs).to(dtype)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) + 0.5)
        layer.bn.running_mean.copy_(torch.randn(channels, generator=g))
        layer.bn.running_var.copy_(torch.rand(channels, generator=g) + 0.5)
    return layer


def data(shape, dtype=torch.float64, seed=1, scale=2.0, shift=0.7):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g, dtype=torch.float64) * scale + shift).to(dtype)


def numpy_of(*tensors):
    return [t.detach().double().numpy().copy() for t in tensors]


def channel_values(x, c):
    return np.concatenate([x[n, c].reshape(-1) for n in range(x.shape[0])])


def batch_stage_numpy(layer, x):
    """Mean and variance that normalize, and the estimates afterwards, one channel at a time."""
    running_mean, running_var = numpy_of(layer.bn.running_mean, layer.bn.running_var)
    if not layer.bn.training:
        return running_mean, running_var, running_mean, running_var
    mean, var = np.empty_like(running_mean), np.empty_like(running_var)
    step = int(layer.bn.num_batches_tracked)
    for c in range(x.shape[1]):
        values = channel_values(x, c)
        count = len(values)
        m = sum(values) / count
        if isinstance(layer, MicroBCN):
            batches = step + (2 if count == 1 else 1)
            r = max(layer.momentum, 1 / batches) if layer.warmup else layer.momentum
            v = sum((values - running_mean[c]) ** 2) / count  # around the old estimate
            running_mean[c] = (1 - r) * running_mean[c] + r * m
            running_var[c] = (1 - r) * running_var[c] + r * v
            mean[c], var[c] = running_mean[c], running_var[c]
        else:
            r = layer.momentum
            squares = sum((values - m) ** 2)
            mean[c], var[c] = m, squares / count
            running_mean[c] = (1 - r) * running_mean[c] + r * m
            running_var[c] = (1 - r) * running_var[c] + r * squares / (count - 1)
    return mean, var, running_mean, running_var


def output_numpy(layer, x, mean, var):
    gb, bb, g, b = numpy_of(layer.bn.weight, layer.bn.bias, layer.weight, layer.bias)
    z, y = np.empty_like(x), np.empty_like(x)
    for n, c in itertools.product(range(x.shape[0]), range(x.shape[1])):
        z[n, c] = gb[c] * (x[n, c] - mean[c]) / np.sqrt(var[c] + EPS) + bb[c]
    width = x.shape[1] // len(g)
    for n, k in itertools.product(range(x.shape[0]), range(len(g))):
        part = z[n, k * width : (k + 1) * width]
        m = part.sum() / part.size
        v = ((part - m) ** 2).sum() / part.size
        y[n, k * width : (k + 1) * width] = g[k] * (part - m) / np.sqrt(v + EPS) + b[k]
    return y


def gradients_composed(layer, x, dy):
    """Output and gradients (x, bn.weight, bn.bias, weight, bias) from torch's own functions."""
    channels, groups = layer.num_features, len(layer.weight)
    leaves = [x, layer.bn.weight, layer.bn.bias, layer.weight, layer.bias]
    x, gb, bb, g, b = (t.detach().double().clone().requires_grad_() for t in leaves)
    if isinstance(layer, MicroBCN) or not layer.bn.training:
        mean, var, *_ = (torch.from_numpy(a) for a in batch_stage_numpy(layer, *numpy_of(x)))
        z = F.batch_norm(x, mean, var, gb, bb, False, 0.0, EPS)
    else:
        z = F.batch_norm(x, None, None, gb, bb, True, 0.0, EPS)
    spread = [1, channels] + [1] * (x.dim() - 2)
    y = F.group_norm(z, groups, eps=EPS) * g.repeat_interleave(channels // groups).view(spread)
    y = y + b.repeat_interleave(channels // groups).view(spread)
    return y.detach(), torch.autograd.grad((y * dy.double()).sum(), [x, gb, bb, g, b])


def run(layer, x, dy):
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    inputs = [x, layer.bn.weight, layer.bn.bias, layer.weight, layer.bias]
    return y.detach(), torch.autograd.grad((y * dy).sum(), inputs)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=IDS)
@pytest.mark.parametrize("cls", LAYERS)
def test_output_and_statistics_equal_numpy(cls, shape, groups, training):
    layer = make(cls, shape[1], groups).train(training)
    layer.bn.num_batches_tracked.fill_(3)
    x = data(shape)
    mean, var, running_mean, running_var = batch_stage_numpy(layer, *numpy_of(x))
    expected = output_numpy(layer, *numpy_of(x), mean, var)
    y = layer(x)
    assert y.dtype == torch.float64
    np.testing.assert_allclose(y.detach().numpy(), expected, **DOUBLE)
    np.testing.assert_allclose(layer.bn.running_mean.numpy(), running_mean, **DOUBLE)
    np.testing.assert_allclose(layer.bn.running_var.numpy(), running_var, **DOUBLE)
    assert int(layer.bn.num_batches_tracked) == 3 + training


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=IDS)
@pytest.mark.parametrize("cls", LAYERS)
def test_gradients(cls, shape, groups, training):
    for dtype in (torch.float64, torch.float32):
        layer = make(cls, shape[1], groups, dtype).train(training)
        x, dy = data(shape, dtype), data(shape, dtype, seed=2)
        expected_y, expected = gradients_composed(layer, x, dy)
        y, grads = run(layer, x, dy)
        names = ["x", "bn.weight", "bn.bias", "weight", "bias"]
        for name, a, b in zip(["y", *names], [y, *grads], [expected_y, *expected], strict=True):
            assert a.dtype == dtype, name
            if dtype == torch.float64:
                torch.testing.assert_close(a, b, **DOUBLE, msg=lambda m, name=name: f"{name}: {m}")
            else:
                assert relative(a, b) < 1e-5, name


def test_gradients_by_central_differences():
    """Also the oracle of the gradients is checked: numpy differences of the numpy output."""
    layer, x = make(BCN, 4, 2), data((2, 4, 2, 2))
    dy = data(x.shape, seed=2)
    _, (dx, *_) = run(copy.deepcopy(layer), x, dy)
    (values,), (dy_np,) = numpy_of(x), numpy_of(dy)

    def loss(v):
        return (output_numpy(layer, v, *batch_stage_numpy(layer, v)[:2]) * dy_np).sum()

    expected, h = np.empty_like(values), 1e-5
    for i in np.ndindex(values.shape):
        up, down = values.copy(), values.copy()
        up[i] += h
        down[i] -= h
        expected[i] = (loss(up) - loss(down)) / (2 * h)
    np.testing.assert_allclose(dx.numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("cls", "training"), [(BCN, True), (BCN, False), (MicroBCN, False)])
def test_gradcheck(cls, training):
    layer = make(cls, 4, 2).train(training)
    names, values = zip(*layer.named_parameters(), strict=True)
    buffers = dict(layer.named_buffers())

    def call(x, *parameters):
        state = {k: v.clone() for k, v in buffers.items()}
        state.update(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    leaves = [t.detach().clone().requires_grad_() for t in (data((2, 4, 3, 2)), *values)]
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("cls", LAYERS)
def test_mean_far_above_the_spread(cls):
    layer = make(cls, 6, 3, torch.float32)
    x = data((2, 6, 8, 8), torch.float32, scale=1.0, shift=1e3)
    if cls is MicroBCN:
        layer.bn.running_mean.copy_(x.mean((0, 2, 3)))
    dy = data(x.shape, torch.float32, seed=2)
    expected_y, (expected_dx, *_) = gradients_composed(layer, x, dy)
    y, (dx, *_) = run(layer, x, dy)
    assert relative(y, expected_y) < 1e-4  # one rounding of the mean is 3e-5 of the spread
    assert relative(dx, expected_dx) < 1e-4


def test_groups_of_one_channel_are_instance_norm():
    layer, x = make(BCN, 6, 6), data((2, 6, 5, 7))
    bn = copy.deepcopy(layer.bn)
    for training in (True, False):
        layer.train(training)
        bn.train(training)
        expected = F.instance_norm(bn(x), weight=layer.weight, bias=layer.bias, eps=EPS)
        torch.testing.assert_close(layer(x), expected, **DOUBLE)


def test_one_group_is_layer_norm_over_the_sample():
    layer, x = make(BCN, 6, 1), data((2, 6, 5, 7))
    bn = copy.deepcopy(layer.bn)
    for training in (True, False):
        layer.train(training)
        bn.train(training)
        expected = F.group_norm(bn(x), 1, eps=EPS) * layer.weight + layer.bias
        torch.testing.assert_close(layer(x), expected, **DOUBLE)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("cls", [BCN, SyncBCN])
def test_running_statistics_follow_batch_norm(cls, momentum):
    layer, bn = cls(4, 2, momentum=momentum).double(), nn.BatchNorm2d(4, momentum=momentum).double()
    for step in range(4):
        x = data((2 + step % 2, 4, 3, 3), seed=step, shift=step)
        layer(x)
        bn(x)
        for name, value in bn.state_dict().items():
            torch.testing.assert_close(layer.bn.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_eval_uses_and_keeps_the_estimates():
    for cls in LAYERS:
        layer, x = make(cls, 6, 3).eval(), data((2, 6, 5, 7))
        before = copy.deepcopy(layer.state_dict())
        together = layer(x)
        apart = torch.cat([layer(sample[None]) for sample in x])
        torch.testing.assert_close(together, apart, **DOUBLE)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("warmup", [True, False])
def test_micro_update_over_four_steps(warmup):
    layer = MicroBCN(4, 2, momentum=0.3, warmup=warmup).double()
    rates = [1, 1 / 2, 1 / 3, 0.3] if warmup else [0.3] * 4
    mean, var = np.zeros(4), np.ones(4)
    for step, r in enumerate(rates):
        x = data((1, 4, 3, 3), seed=step, shift=step + 1)
        (values,) = numpy_of(x)
        for c in range(4):
            v = np.mean((values[:, c] - mean[c]) ** 2)
            mean[c] += r * (values[:, c].mean() - mean[c])
            var[c] += r * (v - var[c])
        y = layer(x)
        np.testing.assert_allclose(layer.bn.running_mean.numpy(), mean, **DOUBLE)
        np.testing.assert_allclose(layer.bn.running_var.numpy(), var, **DOUBLE)
        np.testing.assert_allclose(y.detach(), output_numpy(layer, values, mean, var), **DOUBLE)
    assert int(layer.bn.num_batches_tracked) == 4


def test_micro_momentum_is_schedulable():
    layer = MicroBCN(4, 2, momentum=0.3, warmup=False).double()
    layer.momentum = 0.0
    layer(data((2, 4, 3, 3)))
    assert torch.equal(layer.bn.running_mean, torch.zeros(4).double())
    layer.momentum = 1.0
    x = data((2, 4, 3, 3))
    layer(x)
    torch.testing.assert_close(layer.bn.running_mean, x.mean((0, 2, 3)), **DOUBLE)


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (1, 6)])
def test_one_value_per_channel(shape):
    x = data(shape).requires_grad_()
    for cls in (BCN, SyncBCN):
        layer = make(cls, 6, 3)
        before = copy.deepcopy(layer.state_dict())
        y = layer(x)
        for name, value in layer.state_dict().items():
            assert torch.equal(value, before[name]), name
        torch.testing.assert_close(y, layer.eval()(x), **DOUBLE)
        (dx,) = torch.autograd.grad((y * data(shape, seed=2)).sum(), x)
        assert dx.isfinite().all()
        assert dx.any()
    layer = make(MicroBCN, 6, 3)
    mean, var, *_ = batch_stage_numpy(layer, *numpy_of(x))
    expected = output_numpy(layer, *numpy_of(x), mean, var)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, **DOUBLE)
    np.testing.assert_allclose(layer.bn.running_mean.numpy(), mean, **DOUBLE)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_first_single_values_are_not_their_own_means(momentum):
    """Else all of them vanish, and the group stage multiplies gradients by 1 / sqrt(eps) = 316."""
    layer = MicroBCN(64, 8, momentum=momentum)
    for step in range(5):
        x = data((1, 64, 1, 1), torch.float32, seed=7)
        x += 0.01 * data(x.shape, torch.float32, seed=step)
        x.requires_grad_()
        dy = data(x.shape, torch.float32, seed=2)
        (dx,) = torch.autograd.grad(layer(x), x, dy)
        assert 0.1 < dx.norm() / dy.norm() < 30


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(cls, training):
    layer = make(cls, 6, 3).train(training)
    before = copy.deepcopy(layer.state_dict())
    x = torch.empty(0, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", LAYERS)
def test_half_precision_keeps_float32_statistics(cls, dtype):
    layer = make(cls, 6, 3, torch.float32)
    x = data((2, 6, 8, 8), dtype, scale=400.0, shift=3000.0)  # variances overflow float16
    dy = data(x.shape, dtype, seed=2)
    _mean, _var, running_mean, running_var = batch_stage_numpy(layer, *numpy_of(x))
    expected_y, expected = gradients_composed(layer, x, dy)
    y, grads = run(layer, x, dy)
    assert y.dtype == grads[0].dtype == dtype
    assert relative(y, expected_y) < torch.finfo(dtype).eps
    assert relative(grads[0], expected[0]) < 3 * torch.finfo(dtype).eps
    assert layer.bn.running_mean.dtype == torch.float32
    np.testing.assert_allclose(layer.bn.running_mean.numpy(), running_mean, rtol=1e-5)
    np.testing.assert_allclose(layer.bn.running_var.numpy(), running_var, rtol=1e-4)


@pytest.mark.parametrize("cls", LAYERS)
def test_under_autocast(cls):
    layer, x = make(cls, 6, 3, torch.float32), data((2, 6, 5, 7), torch.float32)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("cls", LAYERS)
def test_constant_input_has_finite_gradients(cls):
    layer = cls(6, 3)
    for x in (torch.full((2, 6, 4, 4), 3.0), torch.zeros(2, 6, 4, 4)):
        y, grads = run(layer, x, data(x.shape, torch.float32))
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("cls", LAYERS)
def test_memory_formats_and_strides(cls):
    x, dy = data((2, 6, 5, 7)), data((2, 6, 5, 7), seed=2)
    expected_y, expected = run(make(cls, 6, 3), x, dy)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        y, grads = run(make(cls, 6, 3), other, dy)
        torch.testing.assert_close(y, expected_y, **DOUBLE)
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, **DOUBLE)


@pytest.mark.parametrize("cls", LAYERS)
def test_groups_that_do_not_divide(cls):
    with pytest.raises(ValueError, match=r"num_groups=32 .* 18 channels.*1, 2, 3, 6, 9, 18"):
        cls(18)
    with pytest.raises(ValueError, match="1, 2, 3, 6"):
        cls(6, num_groups=4)
    for wrong in (0, -3):
        with pytest.raises(ValueError, match="1, 2, 3, 6"):
            cls(6, num_groups=wrong)
    for wrong in (2.0, "two", True, None):
        with pytest.raises(TypeError):
            cls(6, num_groups=wrong)


AUTO = {1: 1, 2: 1, 3: 1, 4: 2, 17: 1, 18: 9, 24: 12, 32: 16, 36: 18, 40: 20, 48: 24, 64: 32}
AUTO |= {72: 24, 96: 32, 100: 25, 144: 24, 160: 32, 256: 32, 270: 30, 2048: 32}


@pytest.mark.parametrize(("channels", "groups"), AUTO.items())
def test_auto_groups(channels, groups):
    layer = BCN(channels, num_groups="auto")
    assert layer.num_groups == groups
    assert layer.weight.shape == layer.bias.shape == (groups,)
    assert layer.bn.weight.shape == (channels,)


@pytest.mark.parametrize("cls", LAYERS)
def test_refused_inputs(cls):
    layer = cls(6, 3)
    for shape in ((2, 5, 4, 4), (2, 12, 4, 4), (6,)):
        with pytest.raises(ValueError, match=r"\(N, 6, \.\.\.\)"):
            layer(torch.zeros(shape))
    with pytest.raises(TypeError, match="int64"):
        layer(torch.zeros(2, 6, 4, 4, dtype=torch.int64))
    assert int(layer.bn.num_batches_tracked) == 0
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match="momentum"):
            cls(6, 3, momentum=wrong)


@pytest.mark.parametrize("cls", LAYERS)
def test_names_and_defaults(cls):
    layer = cls(64)
    assert (layer.num_groups, layer.eps, layer.bn.eps, layer.momentum) == (32, 1e-5, 1e-5, 0.1)
    assert list(dict(layer.named_parameters())) == ["weight", "bias", "bn.weight", "bn.bias"]
    assert set(layer.state_dict()) == {
        *("weight", "bias", "bn.weight", "bn.bias"),
        *("bn.running_mean", "bn.running_var", "bn.num_batches_tracked"),
    }
    assert layer.weight.eq(1).all()
    assert layer.bn.weight.eq(1).all()
    assert not layer.bias.any()
    assert not layer.bn.bias.any()
    assert isinstance(layer, nn.GroupNorm)
    assert not isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert isinstance(layer.bn, nn.modules.batchnorm._BatchNorm)
