"""The statistics against float64 computations over all values, and closed forms."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmbcn import BCN, MicroBCN
from mmbcn.analysis import SingularityMeter, measure_singularity
from mmbcn.analysis.singularity import mean_measures
from mmbcn.errors import UsageError
from mmbcn.layers import FrozenBN

SIZES = [(1, 6, 5), (3, 6, 5), (2, 3, 9), (4, 2, 2)]  # N, H, W of each batch


class Net(nn.Module):
    """Two norms that a ReLU follows, one that none does, and one that never runs."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.first = nn.Conv2d(3, 8, 3, padding=1), norm(8)
        self.conv2, self.second = nn.Conv2d(8, 12, 3, padding=1), norm(12)
        self.skip, self.third = nn.Conv2d(3, 12, 1), norm(12)
        self.dropout = nn.Dropout(0.5)
        self.unused = norm(8)
        for p in self.parameters():
            p.data += 0.3 * torch.randn_like(p)

    def forward(self, x):
        out = self.dropout(F.relu(self.first(self.conv1(x)), inplace=True))
        return F.relu(self.second(self.conv2(out))) + self.third(self.skip(x))


def images(sizes=SIZES, mean=0.0):
    g = torch.Generator().manual_seed(1)
    return [
        torch.randn(n, 3, h, w, generator=g) * (i + 1) + i + mean
        for i, (n, h, w) in enumerate(sizes)
    ]


def pooled(batches):
    """All values of each channel in float64: (C, values)."""
    return np.concatenate(
        [b.double().numpy().swapaxes(0, 1).reshape(b.shape[1], -1) for b in batches], axis=1
    )


def stored(model, name, batches):
    """Every output of a layer in eval mode."""
    outputs = []
    layer = model.get_submodule(name)
    handle = layer.register_forward_hook(lambda m, i, out: outputs.append(out.clone()))
    with torch.no_grad():
        for batch in batches:
            model.eval()(batch)
    handle.remove()
    return outputs


def fixed(scale=(), shift=(), channels=None, eps=1e-12):
    """A norm whose output is ``scale x + shift``, in eval and training."""
    norm = FrozenBN(channels or max(len(scale), len(shift)), eps=eps).double()
    for buffer, values in ((norm.weight, scale), (norm.bias, shift)):
        if len(values):
            buffer.copy_(torch.tensor(values, dtype=torch.float64))
    return norm


def measure_values(norm, x):
    """The statistics of the ReLU behind ``norm`` on input ``x``."""
    [layer] = measure_singularity(nn.Sequential(norm, nn.ReLU()), [x]).layers
    return layer


def assert_same(got, expected, rtol=1e-12, atol=1e-13):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda c: BCN(c, 4), lambda c: MicroBCN(c, 2)])
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_equals_all_values_in_float64(norm, mean):
    model, batches = Net(norm), images(mean=mean)
    found = measure_singularity(model, batches)
    assert [layer.name for layer in found.layers] == ["first", "second"]
    assert found.others == {"third": ["add"]}
    assert found.unreached == ["unused"]
    for layer in found.layers:
        values = pooled(stored(model, layer.name, batches))
        assert layer.values == values.shape[1] == sum(n * h * w for n, h, w in SIZES)
        assert_same(layer.mean, values.mean(1))
        assert_same(layer.std, values.std(1))
        assert_same(layer.active, (values > 0).mean(1))
        assert_same(layer.sigma_mu, values.mean(1).std())
        assert_same(layer.sigma_sigma, values.std(1).std())
        assert_same(layer.dead, ((values > 0).mean(1) < 0.01).mean())


def test_order_and_batches_do_not_matter():
    model, [batch] = Net(), images([(8, 5, 7)])
    whole = measure_singularity(model, [batch])
    parts = measure_singularity(model, [batch[5:], batch[:2], batch[2:5], batch[:0]])
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert_same(a.mean, b.mean, rtol=1e-5, atol=1e-6)  # convolutions round by batch size
        assert_same(a.std, b.std, rtol=1e-5)
        assert_same(list(a.measures().values()), list(b.measures().values()), rtol=1e-5, atol=1e-6)


def test_nothing_is_lost_where_the_mean_is_large():
    x = torch.rand(4, 2, 50, dtype=torch.float64) + 1e8
    meter = SingularityMeter()
    for part in x.split(1):
        meter.add("norm", fixed(channels=2), part)
    [layer] = meter.layers()
    assert_same(layer.std, pooled([x]).std(1), rtol=1e-7)  # E[x^2] - E[x]^2 would give noise


def two_valued(mean, std, size=64):
    """Values of exactly this mean and biased std, (1, 1, size)."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(size // 2)
    return (mean + std * signs)[None, None]


@pytest.mark.parametrize(
    ("mean", "std", "kl"),
    [
        (0, 1, 0.0),
        (1, 1, 0.5),
        (0, math.e, (math.e**2 - 3) / 2),
        (0, 1 / math.e, (math.e**-2 + 1) / 2),
        (-3, 2, (4 + 9 - 1) / 2 - math.log(2)),
    ],
)
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (2.5, -4.0), (-0.3, 0.7)])
def test_kl_is_the_closed_form_without_the_affine(mean, std, kl, scale, shift):
    layer = measure_values(fixed([scale], [shift]), two_valued(mean, std))
    assert_same(layer.mean, [mean * scale + shift], rtol=1e-10)
    assert_same(layer.kl, kl, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.GroupNorm(1, 6), nn.GroupNorm(6, 6)]
)
def test_kl_undoes_the_affine_of_each_channel(norm):
    """As without an affine: of BatchNorm (in training) and InstanceNorm 0."""
    x = torch.randn(1, 6, 40, dtype=torch.float64) * torch.arange(1.0, 7)[:, None]
    norm = norm.double()
    for p in norm.parameters():
        p.data = torch.randn_like(p)
    meter = SingularityMeter()
    meter.add("norm", norm, norm(x))
    with torch.no_grad():
        plain = [m(x) for m in [nn.BatchNorm1d(6, affine=False).double()]]
        if isinstance(norm, nn.GroupNorm):
            plain = [F.group_norm(x, norm.num_groups)]
    mean, std = pooled(plain).mean(1), pooled(plain).std(1)
    assert_same(
        meter.layers()[0].kl_of_channel, (std**2 + mean**2 - 1) / 2 - np.log(std), atol=1e-12
    )


def standardized(n, c, m):
    """Values of mean 0 and variance 1 in every sample and channel."""
    x = torch.randn(n, c, m, dtype=torch.float64)
    return (x - x.mean(2, keepdim=True)) / x.std(2, correction=0, keepdim=True)


@pytest.mark.parametrize("cls", [BCN, MicroBCN])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_both_affines_of_bcn_are_undone(cls, groups):
    """Where each sample is as BatchNorm makes it, what is left is N(0, 1), for any affines."""
    torch.manual_seed(0)
    norm = cls(6, groups, eps=1e-9).double().eval()  # running estimates 0 and 1
    for p in norm.parameters():
        p.data = torch.randn_like(p)
    layer = measure_values(norm, standardized(3, 6, 50))
    assert layer.mean.abs().min() > 1e-3  # it is not before
    assert_same(layer.kl_of_channel, np.zeros(6), atol=1e-12)


def test_group_stage_of_bcn_shows():
    """A group's shift and scale in all samples is undone by that stage: seen per channel."""
    norm = BCN(4, 2, eps=1e-9).double().eval()
    x = standardized(2, 4, 50) * torch.tensor([1.0, 1.0, 3.0, 3.0])[:, None] + 5
    assert_same(measure_values(norm, x).kl, 0, atol=1e-9)
    x[:, 0] += 2  # of group 0's channels one is 2 above the other: +-1 / sqrt(1 + 1)
    layer = measure_values(norm, x)
    assert_same(layer.mean, [0.5**0.5, -(0.5**0.5), 0, 0], rtol=1e-6, atol=1e-9)
    kl = (0.5 + 0.5 - 1 - math.log(0.5)) / 2
    assert_same(layer.kl_of_channel, [kl, kl, 0, 0], rtol=1e-6, atol=1e-8)


def test_planted_dead_channels():
    """P(active) of 0, 0.5 %, exactly 1 % and 100 %: the first two are dead."""
    x = torch.full((1, 4, 200), -1.0, dtype=torch.float64)
    x[0, 1, :1] = x[0, 2, :2] = x[0, 3] = 1
    x[0, 0, :7] = 0  # not above zero
    layer = measure_values(fixed(channels=4), x)
    assert_same(layer.active, [0, 0.005, 0.01, 1])
    assert layer.dead == 0.5


def test_scale_of_zero_and_constant_channels():
    """No KL where the affine cannot be undone; a constant counts with the norm's eps."""
    norm = fixed([0.0, 1.0, 1.0], [0.0, 0.0, 0.0], eps=1e-4)
    x = torch.cat([two_valued(0, 1), two_valued(2, 0), two_valued(0, 1)], 1)
    layer = measure_values(norm, x)
    constant = (1e-4 + 4 / (1 + 1e-4) - 1 - math.log(1e-4)) / 2
    assert layer.kl_of_channel[0].isnan()
    assert_same(layer.kl_of_channel[1:], [constant, 0], rtol=1e-9, atol=1e-8)
    assert_same(layer.kl, constant / 2, rtol=1e-8)
    assert measure_values(fixed([0.0], [1.0]), two_valued(0, 1)).measures()["kl"] is not None


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 3, 4, 5)])
def test_layer_norm_has_its_channels_last(shape):
    norm = nn.LayerNorm(5).double()
    norm.bias.data = torch.randn(5).double()
    x = torch.randn(shape, dtype=torch.float64)
    layer = measure_values(norm, x)
    values = norm(x).detach().numpy().reshape(-1, 5)
    assert_same(layer.mean, values.mean(0))
    assert_same(layer.active, (values > 0).mean(0))


class ClipLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class ImageLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


@pytest.mark.parametrize(
    ("norm", "shape", "axis"),
    [
        (ClipLayerNorm(6), (2, 6, 6), -1),
        (ClipLayerNorm(6), (2, 5, 6), -1),
        (ImageLayerNorm(6), (2, 6, 4, 5), 1),
        (ImageLayerNorm(6), (2, 6, 4, 6), 1),
    ],
)
def test_channels_of_layer_norms_of_others(norm, shape, axis):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[-1]
    x.movedim(axis, 0)[2] += 9
    layer = measure_singularity(nn.Sequential(norm, nn.ReLU()), [x]).layers[0]
    expected = norm(x).detach().double().movedim(axis, 0).flatten(1)
    torch.testing.assert_close(layer.mean, expected.mean(1), rtol=0, atol=1e-12)


def test_layers_with_few_values_do_not_count_in_the_means():
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(31, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 5
    both = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), pool)
    layers = measure_singularity(both, [x]).layers
    assert [layer.values for layer in layers] == [31 * 16, 31]
    assert mean_measures(layers) == layers[0].measures()
    assert mean_measures(layers[1:]) == layers[1].measures()  # or there would be none
    layers = measure_singularity(both, [x, x[:1]]).layers
    assert mean_measures(layers)["kl"] == pytest.approx((layers[0].kl + layers[1].kl) / 2)


def test_norm_in_two_places_is_one_layer():
    class Block(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, x):
            return F.relu(self.norm(x))

    norm = nn.BatchNorm2d(3)
    found = measure_singularity(nn.Sequential(Block(norm), Block(norm)), images())
    assert [layer.name for layer in found.layers] == ["0.norm"]
    assert found.layers[0].values == 2 * sum(n * h * w for n, h, w in SIZES)
    assert not found.others


def test_frozen_norm_that_keeps_its_eps_to_itself():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.tensor([2.0, 1.0, 0.5]))
            self.register_buffer("bias", torch.zeros(3))

        def forward(self, x):
            return x * self.weight.view(1, -1, 1, 1)

    found = measure_singularity(nn.Sequential(FrozenBatchNorm2d(), nn.ReLU()), images())
    plain = measure_singularity(
        nn.Sequential(nn.BatchNorm2d(3, affine=False, eps=0), nn.ReLU()), images()
    )
    torch.testing.assert_close(found.layers[0].kl_of_channel, plain.layers[0].kl_of_channel)


def test_tables_and_json(tmp_path):
    pytest.importorskip("pandas")
    model = Net()
    model.second.weight.data.zero_()
    found = measure_singularity(model, images())
    table, channels = found.table(), found.channels()
    assert list(table.columns) == [
        *("layer", "norm", "channels", "values", "sigma_mu", "sigma_sigma", "dead", "kl")
    ]
    assert list(table["layer"]) == ["first", "second"]
    assert list(table["channels"]) == [8, 12]
    assert list(channels.columns) == ["layer", "channel", "mean", "std", "active", "kl"]
    assert len(channels) == 20
    by_layer = channels.groupby("layer", sort=False)
    assert_same(by_layer["mean"].std(ddof=0), table["sigma_mu"])
    assert_same(by_layer["std"].std(ddof=0), table["sigma_sigma"])
    assert_same(by_layer["kl"].mean(), table["kl"])

    read = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert read["layers"][0]["sigma_mu"] == found.layers[0].sigma_mu
    assert read["layers"][1]["kl"] is None
    assert read["layers"][1]["of_channels"]["kl"] == [None] * 12
    assert read["layers"][0]["of_channels"]["std"] == found.layers[0].std.tolist()
    assert read["means"]["kl"] == found.layers[0].kl
    assert_same(read["means"]["sigma_mu"], table["sigma_mu"].mean())
    assert read["others"] == {"third": ["add"]}
    assert read["unreached"] == ["unused"]


def test_model_is_as_before():
    model = Net().train()
    model.first.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    done = []
    measure_singularity(model, images(), progress=lambda *a: done.append(a))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [m.training for m in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


def test_forward_and_labelled_batches():
    model, batches = Net(), images()
    plain = measure_singularity(model, batches)
    labelled = measure_singularity(model, ((b, 1) for b in batches))
    custom = measure_singularity(model, [dict(x=b) for b in batches], lambda m, b: m(b["x"]))
    assert plain.as_dict() == labelled.as_dict() == custom.as_dict()


@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.Conv2d(3, 3, 1), images(), "Conv2d has no norm layer"),
        (Net(), [], "no batch that reaches a norm"),
        (
            nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid()),
            images(),
            "no ReLU follows a norm in Sequential: 0 -> sigmoid",
        ),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), [torch.zeros(0, 3, 4, 4)], "no batch that"),
        (Net(), [torch.full((1, 3, 4, 4), torch.nan)], r"non-finite values leave first \(8 of 8"),
    ],
)
def test_mistakes(model, batches, message):
    with pytest.raises(UsageError, match=message):
        measure_singularity(model, batches)
