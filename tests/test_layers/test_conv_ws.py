"""Weight standardization against numpy, and against mmcv's layer where that is the formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbcn import WSConv2d

VARIANTS = {
    "released_backbones": (dict(), lambda v, n, eps: np.sqrt(v * n / (n - 1) + eps)),
    "mmcv": (dict(eps_inside=False), lambda v, n, eps: np.sqrt(v * n / (n - 1)) + eps),
    "paper": (dict(unbiased=False), lambda v, n, eps: np.sqrt(v + eps)),
    "outside_biased": (
        dict(unbiased=False, eps_inside=False),
        lambda v, n, eps: np.sqrt(v) + eps,
    ),
}


def standardized_numpy(weight, spread, eps):
    out = np.empty_like(weight)
    for i, filt in enumerate(weight):
        n = filt.size
        mean = filt.sum() / n
        out[i] = (filt - mean) / spread(((filt - mean) ** 2).sum() / n, n, eps)
    return out


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_equal_numpy(variant, eps):
    options, spread = VARIANTS[variant]
    torch.manual_seed(0)
    conv = WSConv2d(4, 6, 3, groups=2, eps=eps, **options).double()
    with torch.no_grad():
        conv.weight.mul_(2).add_(0.3)
    expected = torch.from_numpy(standardized_numpy(conv.weight.detach().numpy(), spread, eps))
    torch.testing.assert_close(conv.standardized_weight(), expected, rtol=1e-12, atol=1e-12)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(
        conv(x), F.conv2d(x, expected, conv.bias, groups=2), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(variant):
    options, spread = VARIANTS[variant]
    torch.manual_seed(0)
    conv = WSConv2d(2, 2, (2, 1), **options).double()
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    (conv(x) * dy).sum().backward()
    weight = conv.weight.detach().numpy().copy()

    def loss(w):
        fixed = torch.from_numpy(standardized_numpy(w, spread, 1e-5))
        return float((F.conv2d(x.detach(), fixed, conv.bias.detach()) * dy).sum())

    expected, h = np.empty_like(weight), 1e-6
    for i in np.ndindex(weight.shape):
        up, down = weight.copy(), weight.copy()
        up[i] += h
        down[i] -= h
        expected[i] = (loss(up) - loss(down)) / (2 * h)
    np.testing.assert_allclose(conv.weight.grad.numpy(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(conv.bias.grad, dy.sum((0, 2, 3)))
    fixed = torch.from_numpy(standardized_numpy(weight, spread, 1e-5))
    torch.testing.assert_close(x.grad, F.conv_transpose2d(dy, fixed))


def test_equals_mmcv_convws():
    mmcv_cnn = pytest.importorskip("mmcv.cnn", exc_type=ImportError)
    torch.manual_seed(0)
    options = dict(stride=2, padding=1, dilation=1, groups=2)
    ours = WSConv2d(4, 6, 3, eps_inside=False, **options).double()
    theirs = mmcv_cnn.ConvWS2d(4, 6, 3, **options).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [0.0, 0.5])  # exactly representable: the variance is exactly 0
def test_constant_filter_has_finite_gradients(variant, value):
    conv = WSConv2d(4, 2, 3, **VARIANTS[variant][0])
    with torch.no_grad():
        conv.weight[0] = value
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    y = conv(x)
    y.square().sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert conv.weight.grad.isfinite().all()
    assert not conv.standardized_weight()[0].any()


def test_one_weight_per_filter_is_refused():
    for channels, groups in ((1, 1), (4, 4)):
        with pytest.raises(ValueError, match="at least 2 weights"):
            WSConv2d(channels, 4, 1, groups=groups)
    WSConv2d(2, 4, 1)


def test_is_a_conv2d():
    conv = WSConv2d(3, 5, (3, 1), stride=2, padding=(1, 0), padding_mode="reflect", bias=False)
    assert isinstance(conv, nn.Conv2d)
    assert list(conv.state_dict()) == ["weight"]
    plain = nn.Conv2d(3, 5, (3, 1), stride=2, padding=(1, 0), padding_mode="reflect", bias=False)
    plain.load_state_dict(conv.state_dict())
    with torch.no_grad():
        plain.weight.copy_(conv.standardized_weight())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(conv(x), plain(x))
    assert list(WSConv2d(3, 5, 3).state_dict()) == list(nn.Conv2d(3, 5, 3).state_dict())


def test_scale_and_shift_of_the_weights_do_not_matter():
    conv = WSConv2d(4, 6, 3, eps=0.0).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(3.0).add_(2.0)
    torch.testing.assert_close(conv(x), before, rtol=1e-9, atol=1e-9)
