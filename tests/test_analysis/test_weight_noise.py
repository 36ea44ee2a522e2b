"""Noise on weights: its moments, what it reaches, and that nothing of it remains."""

import copy

import pytest
import torch
from torch import nn

from mmbcn import BCN, WSConv2d
from mmbcn.analysis import WeightNoise
from mmbcn.analysis.weight_noise import NOISES
from mmbcn.errors import UsageError

KINDS = tuple(NOISES)


def net(conv=nn.Conv2d):
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    return nn.Sequential(conv(3, 8, 3), BCN(8, 2), nn.ReLU(), conv(8, 6, 3), *head).eval()


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def noisy(model, *args, **options):
    with WeightNoise(model, *args, **options):
        return [w.detach().clone() for w in weights(model)]


@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind):
    """Mean and spread of 200,000 noisy weights of known values, within five standard errors."""
    layer = nn.Linear(400, 500, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.5, 2.5, 400).expand(500, 400))
    [w] = noisy(layer, kind, 0.1, seed=5)
    clean = layer.weight.detach().double()
    change = dict(
        additive=(w - clean) / (0.1 * 2.0),  # max - min = 2
        multiplicative=(w / clean - 1) / 0.1,
        lognormal=(w / clean).log() / 0.1,
    )[kind]
    assert change.mean().abs() < 5 / 200000**0.5
    assert (change.std() - 1).abs() < 5 / (2 * 200000) ** 0.5
    for moment, expected, error in ((3, 0, 15), (4, 3, 96)):  # of a normal distribution
        assert (change.pow(moment).mean() - expected).abs() < 5 * (error / 200000) ** 0.5
    by_row = change.view(500, 400)
    corr = torch.corrcoef(torch.stack([by_row[:, :-1].ravel(), by_row[:, 1:].ravel()]))[0, 1]
    assert corr.abs() < 5 / 200000**0.5


def test_range_is_that_of_each_layer():
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    with torch.no_grad():
        for layer, reach in zip(model, (1.0, 50.0), strict=True):
            layer.weight.uniform_(-reach, reach)
    for w, new in zip(weights(model), noisy(model, "additive", 0.01), strict=True):
        sigma = 0.01 * float(w.detach().max() - w.detach().min())
        assert float((new - w.detach()).std()) == pytest.approx(sigma, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_seed_gives_the_same_noise_and_others_differ(kind):
    model = net()
    first = noisy(model, kind, 0.1, seed=1)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, noisy(model, kind, 0.1, seed=1)))
    assert not any(map(torch.equal, first, noisy(model, kind, 0.1, seed=2)))
    assert not torch.equal(first[0].flatten()[:100], first[1].flatten()[:100])


def test_draws_nothing_from_the_global_generator():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    layer = nn.Linear(3, 3)
    torch.manual_seed(3)
    noisy(layer, "additive", 0.1)
    with WeightNoise(layer, "additive", 0.1, fresh=True):
        layer(torch.zeros(1, 3))
        assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("conv", [nn.Conv2d, WSConv2d])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_outputs_are_bit_identical_afterwards(kind, fresh, conv):
    model, x = net(conv), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        clean = model(x)  # WSConv2d keeps its standardized weights from here on
        state = copy.deepcopy(model.state_dict())
        places = [p.data_ptr() for p in model.parameters()]
        with WeightNoise(model, kind, 0.1, fresh=fresh):
            changed = model(x)
            again = model(x)
        assert (changed - clean).abs().max() > 1e-4
        assert torch.equal(changed, again) != fresh
        assert torch.equal(model(x), clean)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert places == [p.data_ptr() for p in model.parameters()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fresh", [False, True])
def test_exception_leaves_the_clean_weights(fresh):
    class Breaks(nn.Conv2d):
        def forward(self, x):
            super().forward(x)
            raise KeyboardInterrupt

    model = nn.Sequential(Breaks(3, 4, 3), nn.Conv2d(4, 4, 1))
    before = [w.detach().clone() for w in weights(model)]
    noise = WeightNoise(model, "additive", 0.5, fresh=fresh)
    with pytest.raises(KeyboardInterrupt), noise:
        model(torch.zeros(1, 3, 5, 5))
    assert all(map(torch.equal, before, weights(model)))
    with noise:  # and it can be entered again
        assert fresh or not torch.equal(before[0], model[0].weight)


@pytest.mark.parametrize("fresh", [False, True])
def test_standardized_weights_are_those_of_the_noisy_ones(fresh):
    """Neither what eval kept of the clean weights nor of an earlier noise is used."""
    layer, x = WSConv2d(3, 4, 3, bias=False).eval(), torch.randn(1, 3, 6, 6)
    plain = nn.Conv2d(3, 4, 3, bias=False)
    with torch.no_grad():
        layer(x)
        for seed in range(2):
            [raw] = noisy(layer, "additive", 0.1, seed=seed)
            plain.weight.copy_(
                (raw - raw.mean((1, 2, 3), keepdim=True))
                / (raw.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
            )
            with WeightNoise(layer, "additive", 0.1, seed=seed, fresh=fresh):
                torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_level_zero_changes_nothing(kind):
    model = net()
    assert all(map(torch.equal, weights(model), noisy(model, kind, 0.0)))


def test_only_weights_of_convolutions_and_linear_layers_are_noisy():
    model = net()
    others = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("bias")}
    others |= {k: v.clone() for k, v in model[1].state_dict(prefix="1.").items()}
    with WeightNoise(model, "multiplicative", 0.3):
        now = model.state_dict()
        assert all(torch.equal(v, now[k]) for k, v in others.items())


def test_shared_weight_is_noisy_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with WeightNoise(model, "multiplicative", 0.3):
        assert model[1].weight is model[0].weight
        inside = model[0].weight.clone()
    assert torch.equal(inside, noisy(nn.Sequential(model[0]), "multiplicative", 0.3)[0])


def test_shared_weight_is_noisy_in_each_layer_that_runs_with_it():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        with WeightNoise(model, "multiplicative", 0.3, seed=1, fresh=True):
            seen = [layer(torch.ones(1, 4)) for layer in model]
        assert torch.equal(model[0].weight, torch.eye(4))
    assert (seen[0] != 1).all()
    assert (seen[1] != 1).all()
    assert not torch.equal(*seen)


@pytest.mark.parametrize("fresh", [False, True])
def test_attention_runs_with_noise_on_all_its_projections(fresh):
    torch.manual_seed(0)
    x, kv = torch.randn(3, 1, 8), torch.randn(4, 1, 6)
    keys = ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    for key in (None, *keys):  # alone, as the others' range is zero
        layer = nn.MultiheadAttention(8, 2, kdim=6, vdim=6).eval()
        with torch.no_grad():
            for other in keys:
                if key is not None and other != key:
                    layer.get_parameter(other).fill_(0.1)
            clean = layer(x, kv, kv)[0]
            with WeightNoise(layer, "additive", 0.3, fresh=fresh):
                assert not torch.equal(layer(x, kv, kv)[0], clean), key
            assert torch.equal(layer(x, kv, kv)[0], clean)


def test_layer_that_computes_its_weight_is_refused():
    weight_norm = nn.utils.parametrizations.weight_norm
    for wrap in (weight_norm, nn.utils.weight_norm):
        model = nn.Sequential(nn.Linear(3, 3), wrap(nn.Linear(3, 3)))
        with pytest.raises(UsageError, match=r"^1 computes its weight from others"):
            WeightNoise(model, "additive", 0.1)


def test_half_precision_keeps_its_type():
    model = nn.Linear(50, 50).bfloat16()
    [w] = noisy(model, "additive", 0.1)
    assert w.dtype == torch.bfloat16
    assert (w != model.weight).float().mean() > 0.9


def test_mistakes_say_what_to_do():
    model = net()
    with pytest.raises(UsageError, match="unknown noise 'gauss'; known: additive, multiplicative"):
        WeightNoise(model, "gauss", 0.1)
    for level in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="must be 0 or more, and finite"):
            WeightNoise(model, "additive", level)
    with pytest.raises(UsageError, match="no convolution or linear layer"):
        WeightNoise(nn.BatchNorm2d(3), "additive", 0.1)
    noise = WeightNoise(model, "additive", 0.1)
    with noise, pytest.raises(UsageError, match="entered already"):
        noise.__enter__()
    with torch.no_grad():
        weights(model)[0].add_(1)
    with pytest.raises(UsageError, match="weights have changed"):
        noise.__enter__()
