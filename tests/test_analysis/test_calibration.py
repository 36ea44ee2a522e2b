"""Calibration against closed forms, and against training passes over all images at once."""

import copy
import itertools

import pytest
import torch
from torch import nn

from mmbcn import BCN, MicroBCN, SyncBCN, WSConv2d
from mmbcn.analysis import calibrate
from mmbcn.errors import UsageError

F64 = torch.float64
SIZES = [(1, 6, 5), (3, 6, 5), (2, 3, 9), (4, 1, 2)]  # N, H, W of each batch


def images(channels=3, sizes=SIZES, dtype=F64, mean=0.0, seed=0):
    """Batches whose own means and spreads differ, so that averages of variances would show."""
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(n, channels, h, w, generator=g, dtype=F64) * (i + 1) + 2 * i + mean).to(dtype)
        for i, (n, h, w) in enumerate(sizes)
    ]


def pooled(batches):
    """All values of each channel: (C, values)."""
    channels = batches[0].shape[1]
    return torch.cat([b.transpose(0, 1).reshape(channels, -1) for b in batches], 1)


def stages(model):
    """The modules that hold running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def statistics(model):
    return [s for m in stages(model) for s in (m.running_mean.clone(), m.running_var.clone())]


def assert_same(got, expected, rtol=1e-12, atol=1e-12):
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def net(norm, conv=nn.Conv2d, kernel=3, widths=(3, 8, 6, 8)):
    """Residual, so that the statistics of a layer depend on several before it."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, inside, outside):
            super().__init__()
            self.conv = conv(inside, outside, kernel, padding=kernel // 2)
            self.bn = norm(outside)
            self.skip = nn.Conv2d(inside, outside, 1)
            self.skip_bn = norm(outside)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x):
            return self.dropout(self.bn(self.conv(x)).relu()) + self.skip_bn(self.skip(x))

    model = nn.Sequential(*(Block(a, b) for a, b in itertools.pairwise(widths))).double()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


NORMS = {
    "bn": nn.BatchNorm2d,
    "bcn": lambda c: BCN(c, 2),
    "microbcn": lambda c: MicroBCN(c, 2),
}


def one_huge_batch(model, x):
    """What training passes over ``x`` leave: the latest update counts with weight one."""
    model = copy.deepcopy(model).train()
    micro = any(isinstance(m, MicroBCN) for m in model.modules())
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.eval()
        if isinstance(m, (*map(type, stages(model)), MicroBCN)):
            m.momentum = 1.0
    with torch.no_grad():
        for _ in range(len(stages(model)) + 1 if micro else 1):  # its update looks one step back
            model(x)
    return model


@pytest.mark.parametrize(
    ("layer", "micro"),
    [
        (nn.BatchNorm2d(3), False),
        (nn.SyncBatchNorm(3), False),
        (BCN(3, 1), False),
        (SyncBCN(3, 3), False),
        (nn.SyncBatchNorm.convert_sync_batchnorm(BCN(3, 1)), False),
        (MicroBCN(3, 1), True),
        (MicroBCN(3, 3, warmup=False, sync=True), True),
    ],
)
def test_statistics_equal_the_closed_form(layer, micro):
    batches = images()
    values = pooled(batches)
    calibrate(layer.double(), batches)
    [stage] = stages(layer)
    assert_same([stage.running_mean], [values.mean(1)])
    assert_same([stage.running_var], [values.var(1, correction=0 if micro else 1)])
    assert stage.num_batches_tracked == len(batches)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d(4), ()), (nn.BatchNorm1d(4), (5,)), (nn.BatchNorm3d(4), (2, 3, 2))],
)
def test_other_dimensions(layer, shape):
    batches = [
        b + 3 * i for i, b in enumerate(torch.randn(6, 4, *shape, dtype=F64).split([1, 3, 2]))
    ]
    calibrate(layer.double(), batches)
    values = pooled(batches)
    assert_same([layer.running_mean, layer.running_var], [values.mean(1), values.var(1)])


@pytest.mark.parametrize("one_pass", [False, True])
def test_large_mean_loses_nothing(one_pass):
    batches = images(dtype=torch.float32, mean=3e4)
    values = pooled(batches).double()
    layer = BCN(3, 1)
    calibrate(layer, batches, one_pass=one_pass)
    assert_same([layer.bn.running_mean.double()], [values.mean(1)], rtol=1e-7)
    assert_same([layer.bn.running_var.double()], [values.var(1)], rtol=1e-6)


@pytest.mark.parametrize("conv", [nn.Conv2d, WSConv2d])
@pytest.mark.parametrize("name", NORMS)
def test_network_equals_one_huge_batch(name, conv):
    model = net(NORMS[name], conv)
    [x] = images(sizes=[(9, 7, 6)])
    x = x * torch.arange(1, 10, dtype=F64).view(-1, 1, 1, 1)  # images that differ
    expected = statistics(one_huge_batch(model, x))
    calls = []
    result = calibrate(
        model, list(x.split([4, 1, 3, 1])), progress=lambda done, of: calls.append((done, of))
    )
    assert_same(statistics(model), expected)
    assert len(result.changes) == 6
    assert calls == [(i, 24) for i in range(1, 25)]


def test_images_of_unequal_sizes_count_by_their_values():
    """With 1x1 convolutions, all pixels of all images make one image."""
    model = net(nn.BatchNorm2d, kernel=1)
    batches = images()
    expected = one_huge_batch(model, pooled(batches)[None, :, :, None])
    calibrate(model, batches)
    assert_same(statistics(model), statistics(expected))


def test_scale_and_shift_of_a_convolution_are_undone():
    def norm(c):
        layer = NORMS["bcn"](c)
        layer.bn.eps = 0.0
        return layer

    model, batches = net(norm).eval().requires_grad_(False), images(sizes=SIZES[:3])
    calibrate(model, batches)
    clean = [model(b) for b in batches]
    g = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            scale = torch.rand(len(m.weight), generator=g, dtype=F64) * 5 + 0.1
            m.weight.mul_(scale.view(-1, 1, 1, 1))
            m.bias.mul_(scale).add_(torch.randn(len(scale), generator=g, dtype=F64))
    broken = [model(b) for b in batches]
    assert max(float((a - b).abs().max()) for a, b in zip(broken, clean, strict=True)) > 0.1
    result = calibrate(model, batches)
    assert_same([model(b) for b in batches], clean, atol=1e-10, rtol=1e-10)
    assert all(c.mean_shift > 0.01 and c.var_factor != 1 for c in result.changes)


@pytest.mark.parametrize("name", NORMS)
def test_again_gives_the_same_whatever_was_before(name):
    model, batches = net(NORMS[name]), images()
    calibrate(model, batches)
    first = statistics(model)
    result = calibrate(model, batches)
    assert_same(statistics(model), first, 0, 0)
    assert all(c.mean_shift == 0 and c.var_factor == 1 for c in result.changes)
    for stage in stages(model):
        stage.running_mean.fill_(torch.nan)
        stage.running_var.zero_()
    calibrate(model, batches)
    assert_same(statistics(model), first, 0, 0)


def test_reports_the_change_of_the_channel_that_changed_most():
    layer = nn.BatchNorm2d(2, eps=0.0).double()
    layer.running_mean.copy_(torch.tensor([1.0, 5.0]))
    layer.running_var.copy_(torch.tensor([4.0, 0.5]))
    x = torch.tensor([[0.0, 3.0], [2.0, 5.0]], dtype=F64)  # means 1 and 4, variances 2
    [change] = calibrate(layer, [x[:, :, None, None]]).changes
    assert change.mean_shift == pytest.approx(1 / 2**0.5)
    assert change.var_factor == pytest.approx(4)
    assert (change.kind, change.values) == ("BatchNorm2d", 2)


class Freezing(nn.Sequential):
    """As mm backbones: ``train()`` freezes parameters and sets modes."""

    def train(self, mode=True):
        super().train(mode)
        self[0].weight.requires_grad = False
        self[1].eval()
        return self


@pytest.mark.parametrize("one_pass", [False, True])
def test_nothing_but_statistics_changes(one_pass):
    model = Freezing(WSConv2d(3, 4, 3), BCN(4, 2), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).double()
    model.training = True
    model[1].train()
    model[3].weight.requires_grad = False
    model[3].momentum = None

    def look():
        state = {k: v.clone() for k, v in model.state_dict().items() if "running" not in k}
        state.pop("1.bn.num_batches_tracked"), state.pop("3.num_batches_tracked")
        trained = [p.requires_grad for p in model.parameters()]
        return state, trained, [m.training for m in model.modules()], model[3].momentum

    before = look()
    assert before[1][0]
    calibrate(model, images(sizes=SIZES[:2]), one_pass=one_pass)
    after = look()
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:] == after[1:]
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("one_pass", [False, True])
def test_exception_leaves_the_model_as_it_was(one_pass):
    model = net(NORMS["bcn"])
    for stage in stages(model):
        stage.running_mean.normal_()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    calls = []

    def forward(model, batch):
        calls.append(batch)
        if len(calls) == (3 if one_pass else 9):  # in the first, or the third of six passes
            raise KeyboardInterrupt
        model(batch)

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, images(), forward, one_pass)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert all(m.training and not m._forward_pre_hooks for m in model.modules())


def test_batches_of_a_loader_with_labels():
    data = torch.utils.data.TensorDataset(torch.randn(7, 3, 4, 4, dtype=F64), torch.zeros(7))
    layer = nn.BatchNorm2d(3).double()
    calibrate(layer, torch.utils.data.DataLoader(data, batch_size=3, shuffle=True))
    assert_same([layer.running_var], [pooled([data.tensors[0]]).var(1)])


def test_unreached_layers_are_named_and_kept():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.free = nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, x):
            return self.free(self.used(x))

    model = Model().double()
    result = calibrate(model, images())
    assert [c.name for c in result.changes] == ["used"]
    assert result.unreached == ["spare"]
    assert model.spare.running_var.eq(1).all()
    assert model.spare.num_batches_tracked == 0
    assert "not reached, as before: spare" in result.text()


def test_one_pass_comes_close_as_images_become_many():
    model = net(NORMS["bcn"])
    [x] = images(sizes=[(400, 3, 3)])
    exact, rough = copy.deepcopy(model), copy.deepcopy(model)
    calibrate(exact, [x])
    calibrate(rough, iter(x.split(2)), one_pass=True)
    assert_same(statistics(rough)[:2], statistics(exact)[:2])  # the first layer is exact
    assert all(int(s.num_batches_tracked) == 200 for s in stages(rough))
    for stage, other in zip(stages(exact), stages(rough), strict=True):
        shift = (stage.running_mean - other.running_mean).abs() / stage.running_var.sqrt()
        assert shift.max() < 0.1
        torch.testing.assert_close(other.running_var, stage.running_var, rtol=0.1, atol=0)


def test_one_pass_pools_the_calls_of_a_shared_layer():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x) + self.bn(3 * x + 1)

    batches = images()
    model = Shared().double()
    with pytest.raises(UsageError, match=r"bn runs 2 times in a forward pass.*one_pass=True"):
        calibrate(model, batches)
    calibrate(model, batches, one_pass=True)
    values = pooled([c for b in batches for c in (b, 3 * b + 1)])
    assert_same([model.bn.running_mean, model.bn.running_var], [values.mean(1), values.var(1)])


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(
    ("model", "batches", "message"),
    [
        (nn.GroupNorm(1, 3), images(), "GroupNorm has nothing to calibrate"),
        (nn.BatchNorm2d(3), [], "no batch that reaches a norm"),
        (nn.BatchNorm2d(3), images(sizes=[(1, 1, 1)]), "sees 1 value per channel"),
        (
            BCN(3, 1),
            [images()[0], images()[1] * torch.inf],
            r"non-finite values reach BCN \(3 of 3",
        ),
    ],
)
def test_mistakes_say_what_to_do(model, batches, message, one_pass):
    model = copy.deepcopy(model).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        calibrate(model, batches, one_pass=one_pass)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_iterator_is_refused_where_several_passes_are_needed():
    with pytest.raises(UsageError, match="needs a list or a DataLoader, got a generator"):
        calibrate(nn.BatchNorm2d(3), (b for b in images()))
