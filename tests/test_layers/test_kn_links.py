"""What the layers of Kalman normalization are linked to, against lists written by hand."""

import copy
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmbcn
from mmbcn import KN, WSConv2d, convert_norm, set_norm
from mmbcn.layers import describe_links, link_norms, unlink_norms

REPO = Path(mmbcn.__file__).parents[1]
needs_mm = pytest.mark.skipif(
    not all(map(find_spec, ("mmengine", "mmcv", "mmseg"))), reason="needs mmseg"
)

# DeepLabV3 R-18 of mmseg, depth 1 of each stage cut to one block: written out in full
R18 = {
    "backbone.stem.4": "backbone.stem.3(relu(backbone.stem.1))",
    "backbone.stem.7": "backbone.stem.6(relu(backbone.stem.4))",
    "backbone.layer1.0.bn1": "backbone.layer1.0.conv1(relu(backbone.stem.7))",
    "backbone.layer1.0.bn2": "backbone.layer1.0.conv2(relu(backbone.layer1.0.bn1))",
    "backbone.layer1.1.bn1": "backbone.layer1.1.conv1("
    "relu(backbone.layer1.0.bn2 + relu(backbone.stem.7)))",
    "backbone.layer1.1.bn2": "backbone.layer1.1.conv2(relu(backbone.layer1.1.bn1))",
    "backbone.layer2.0.bn1": "backbone.layer2.0.conv1("
    "relu(backbone.layer1.1.bn2 + relu(backbone.layer1.0.bn2 + relu(backbone.stem.7))))",
    "backbone.layer2.0.bn2": "backbone.layer2.0.conv2(relu(backbone.layer2.0.bn1))",
    "backbone.layer2.0.downsample.1": "backbone.layer2.0.downsample.0("
    "relu(backbone.layer1.1.bn2 + relu(backbone.layer1.0.bn2 + relu(backbone.stem.7))))",
    "backbone.layer2.1.bn1": "backbone.layer2.1.conv1("
    "relu(backbone.layer2.0.bn2 + backbone.layer2.0.downsample.1))",
    "backbone.layer2.1.bn2": "backbone.layer2.1.conv2(relu(backbone.layer2.1.bn1))",
    "backbone.layer3.0.bn1": "backbone.layer3.0.conv1(relu(backbone.layer2.1.bn2 + "
    "relu(backbone.layer2.0.bn2 + backbone.layer2.0.downsample.1)))",
    "backbone.layer3.0.bn2": "backbone.layer3.0.conv2(relu(backbone.layer3.0.bn1))",
    "backbone.layer3.0.downsample.1": "backbone.layer3.0.downsample.0(relu(backbone.layer2.1.bn2 + "
    "relu(backbone.layer2.0.bn2 + backbone.layer2.0.downsample.1)))",
    "backbone.layer3.1.bn1": "backbone.layer3.1.conv1("
    "relu(backbone.layer3.0.bn2 + backbone.layer3.0.downsample.1))",
    "backbone.layer3.1.bn2": "backbone.layer3.1.conv2(relu(backbone.layer3.1.bn1))",
    "backbone.layer4.0.bn1": "backbone.layer4.0.conv1(relu(backbone.layer3.1.bn2 + "
    "relu(backbone.layer3.0.bn2 + backbone.layer3.0.downsample.1)))",
    "backbone.layer4.0.bn2": "backbone.layer4.0.conv2(relu(backbone.layer4.0.bn1))",
    "backbone.layer4.0.downsample.1": "backbone.layer4.0.downsample.0(relu(backbone.layer3.1.bn2 + "
    "relu(backbone.layer3.0.bn2 + backbone.layer3.0.downsample.1)))",
    "backbone.layer4.1.bn1": "backbone.layer4.1.conv1("
    "relu(backbone.layer4.0.bn2 + backbone.layer4.0.downsample.1))",
    "backbone.layer4.1.bn2": "backbone.layer4.1.conv2(relu(backbone.layer4.1.bn1))",
}


def heads(last, third):
    """Links of the ASPP head behind stage 4 and the FCN head behind stage 3."""
    aspp = {
        f"decode_head.aspp_modules.{i}.bn": f"decode_head.aspp_modules.{i}.conv({last})"
        for i in range(4)
    }
    return {
        **aspp,
        "decode_head.bottleneck.bn": "decode_head.bottleneck.conv(cat("
        "relu(decode_head.image_pool.1.bn), relu(decode_head.aspp_modules.0.bn), "
        "relu(decode_head.aspp_modules.1.bn), relu(decode_head.aspp_modules.2.bn), "
        "relu(decode_head.aspp_modules.3.bn)))",
        "auxiliary_head.convs.0.bn": f"auxiliary_head.convs.0.conv({third})",
    }


R18 |= heads(
    "relu(backbone.layer4.1.bn2 + relu(backbone.layer4.0.bn2 + backbone.layer4.0.downsample.1))",
    "relu(backbone.layer3.1.bn2 + relu(backbone.layer3.0.bn2 + backbone.layer3.0.downsample.1))",
)


def r50():
    links = {
        "backbone.stem.4": "backbone.stem.3(relu(backbone.stem.1))",
        "backbone.stem.7": "backbone.stem.6(relu(backbone.stem.4))",
    }
    stream, ends = "relu(backbone.stem.7)", []
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            b = f"backbone.layer{stage}.{block}"
            links[f"{b}.bn1"] = f"{b}.conv1({stream})"
            links[f"{b}.bn2"] = f"{b}.conv2(relu({b}.bn1))"
            links[f"{b}.bn3"] = f"{b}.conv3(relu({b}.bn2))"
            if block == 0:
                links[f"{b}.downsample.1"] = f"{b}.downsample.0({stream})"
                stream = f"{b}.downsample.1"
            stream = f"relu({b}.bn3 + {stream})"
        ends.append(stream)
    return links | heads(ends[3], ends[2])


def deeplab(depth):
    from mmengine import Config

    model = Config.fromfile(REPO / f"configs/_base_/models/deeplabv3_r{depth}.py").model
    wide = 4 if depth == 50 else 1
    model.backbone.update(stem_channels=8, base_channels=8)
    model.decode_head.update(in_channels=64 * wide, channels=16)
    model.auxiliary_head.update(in_channels=32 * wide, channels=8)
    return model


def build(model):
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(model)


@needs_mm
@pytest.mark.parametrize(("depth", "expected"), [(18, R18), (50, r50())])
def test_deeplab_of_mmseg(depth, expected):
    with pytest.warns(UserWarning, match=r"1 of \d+ KN layers") as warned:
        net = build(set_norm(deeplab(depth), "kn"))
    assert describe_links(net) == expected
    norms = {n for n, m in net.named_modules() if isinstance(m, KN)}
    assert norms - expected.keys() == {"backbone.stem.1", "decode_head.image_pool.1.bn"}
    message = next(str(w.message) for w in warned if "KN layers" in str(w.message))
    assert message.endswith("act as BatchNorm:\n  decode_head.image_pool.1.bn: behind mean")


@needs_mm
def test_set_norm_and_back():
    from mmseg.models import EncoderDecoder

    model = deeplab(18)
    before = copy.deepcopy(set_norm(set_norm(model, "bn_ws"), "bn"))
    for name in ("kn_ws", "kn", "kn"):
        set_norm(model, name)
        assert (model.type, model.linked_type) == ("mmbcn.norms.linked_model", "EncoderDecoder")
        assert model.backbone.norm_cfg == dict(type="mmbcn.KN", requires_grad=True)
    assert type(build(copy.deepcopy(model))) is EncoderDecoder
    assert set_norm(model, "bn") == before
    with pytest.raises(mmbcn.errors.UsageError, match="'Encoder'"):
        mmbcn.norms.linked_model("Encoder")


@needs_mm
def test_whoever_builds_a_model_gets_its_links(tmp_path):
    """Mmseg's own functions, in a process that never imports mmbcn; with learned transitions."""
    config = set_norm(deeplab(18), "kn")
    for part in (config.backbone, config.decode_head, config.auxiliary_head):
        part.norm_cfg.transition = "linear"
    from mmengine import Config

    path = tmp_path / "model.py"
    Config(dict(model=config, default_scope="mmseg")).dump(path)
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "from mmseg.apis import init_model\n"
        "assert 'mmbcn' not in sys.modules\n"
        "net = init_model(sys.argv[1], device='cpu')\n"
        "print(len([n for n, p in net.named_parameters() if 'transition_weight' in n]))\n"
        "print(net.backbone.layer1[0].bn1.transition_weight.shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-3:-1] == ["27", "torch.Size([8, 8])"]


@needs_mm
def test_linking_changes_nothing_else():
    net = build(set_norm(deeplab(18), "kn_ws"))
    net.backbone.layer1.eval()
    modes = {n: m.training for n, m in net.named_modules()}
    for layer in net.modules():
        if isinstance(layer, KN):
            layer.links = None
    state, rng = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with pytest.warns(UserWarning, match="1 of 29 KN layers"):
        link_norms(net)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {n: m.training for n, m in net.named_modules()} == modes
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert all(type(p) is nn.Parameter for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(p.grad_fn is None for p in net.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        link_norms(net)  # there is nothing left to do


@needs_mm
@pytest.mark.parametrize("with_cp", [False, True])
@pytest.mark.parametrize("name", ["kn", "kn_ws"])
def test_trains(name, with_cp):
    """One image; every weight gets a gradient, the same with mmseg's checkpointing."""
    results = []
    for cp in {False, with_cp}:
        model = set_norm(deeplab(18), name)
        model.backbone.with_cp = cp
        net = build(model).double().train()
        torch.manual_seed(1)
        x = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(2)
        features = net.extract_feat(x)
        outputs = [net.decode_head(features), net.auxiliary_head(features)]
        sum(y.square().mean() for y in outputs).backward()
        results.append({n: p.grad for n, p in net.named_parameters()} | dict(net.named_buffers()))
    for key, value in results[0].items():
        assert value.isfinite().all()
        torch.testing.assert_close(results[-1][key], value, rtol=1e-8, atol=1e-10, msg=key)


# --- plain PyTorch -------------------------------------------------------------------------------


class PlainBlock(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.downsample = None
        if stride > 1:
            conv = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outside))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class PlainResNet(nn.Module):
    """torchvision's ResNet, with two stages of one block."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(PlainBlock(4, 4, 1))
        self.layer2 = nn.Sequential(PlainBlock(4, 6, 2))
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


PLAIN = {
    "layer1.0.bn1": "layer1.0.conv1(relu(bn1))",
    "layer1.0.bn2": "layer1.0.conv2(relu(layer1.0.bn1))",
    "layer2.0.bn1": "layer2.0.conv1(relu(layer1.0.bn2 + relu(bn1)))",
    "layer2.0.bn2": "layer2.0.conv2(relu(layer2.0.bn1))",
    "layer2.0.downsample.1": "layer2.0.downsample.0(relu(layer1.0.bn2 + relu(bn1)))",
}


@pytest.mark.parametrize("name", ["kn", "kn_ws"])
def test_convert_norm(name):
    net = PlainResNet()
    state = copy.deepcopy(net.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_norm(net, name)
    assert describe_links(net) == PLAIN
    assert type(net.layer1[0].conv1) is (WSConv2d if name == "kn_ws" else nn.Conv2d)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    net.train()(torch.randn(1, 3, 32, 32)).sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    convert_norm(convert_norm(net, "bn"), "kn")  # from KN, and to it again
    assert describe_links(net) == PLAIN
    assert type(convert_norm(net, "bn").bn1) is nn.BatchNorm2d


def test_standardized_weights_predict():
    """The prediction goes through the weights that the convolution uses."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), KN(4), nn.ReLU(), WSConv2d(4, 6, 3), KN(6, q=0.0))
    link_norms(net)
    plain = copy.deepcopy(net)
    plain[3] = nn.Conv2d(4, 6, 3)
    plain[3].weight = nn.Parameter(net[3].standardized_weight().detach())
    plain[3].bias = net[3].bias
    for layer in (plain[1], plain[4]):
        layer.links = None
    link_norms(plain)
    outputs = []
    for model in (net, plain):
        torch.manual_seed(0)
        outputs.append(model(torch.arange(300.0).view(1, 3, 10, 10).sin()))
    torch.testing.assert_close(*outputs)


class Chain(nn.Module):
    """Conv, norm, something, conv, norm."""

    def __init__(self, between, wide=4):
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), KN(4)
        self.between = between
        self.second, self.norm2 = nn.Conv2d(wide, 5, 3, padding=1), KN(5)

    def forward(self, x):
        return self.norm2(self.second(self.between(self.norm1(self.first(x)))))


def pad_channels(x):
    return F.pad(x[:, :, ::2, ::2].relu(), (0, 0, 0, 0, 1, 2))


@pytest.mark.parametrize(
    ("between", "wide", "expected"),
    [
        (nn.Identity(), 4, "norm1"),
        (lambda x: x.clone().double().float().contiguous(), 4, "norm1"),
        (nn.Sequential(nn.Dropout(0.5), nn.ReLU(inplace=True)), 4, "relu(norm1)"),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2)), 4, "relu(norm1)"),
        (nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), 4, "relu(norm1)"),
        (lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), 4, "norm1"),
        (lambda x: F.pad(x, (1, 1, 2, 2)), 4, "norm1"),
        (pad_channels, 7, "pad(relu(norm1))"),
        (lambda x: torch.cat([x, x.relu()], 1), 8, "cat(norm1, relu(norm1))"),
        (lambda x: x + x.relu(), 4, "norm1 + relu(norm1)"),
        (lambda x: torch.cat([x, x[:, :1]], 1), 5, None),
        (lambda x: torch.cat([x, x], 2), 4, None),
        (lambda x: torch.add(x, x, alpha=2), 4, None),
        (lambda x: x + x.new_ones(()), 4, None),
        (lambda x: x * 2, 4, None),
        (nn.SiLU(), 4, None),
        (nn.AdaptiveAvgPool2d(4), 4, None),
        (nn.Conv2d(4, 4, 1), 4, "between(norm1)"),
        (nn.ConvTranspose2d(4, 4, 2), 4, None),
        (nn.GroupNorm(2, 4), 4, None),
        (lambda x: torch.rand_like(x), 4, None),
        (lambda x: F.pad(x, (1, 1), value=1.0), 4, None),
    ],
)
def test_what_is_followed(between, wide, expected):
    class Function(nn.Module):
        def forward(self, x):
            return between(x)

    net = Chain(between if isinstance(between, nn.Module) else Function(), wide)
    if expected is None:
        with pytest.warns(UserWarning, match="1 of 2 KN layers .*\n  norm2: (behind|its input)"):
            link_norms(net)
        assert describe_links(net) == {}
    else:
        link_norms(net)
        assert describe_links(net) == {"norm2": f"second({expected})"}
        net(torch.randn(2, 3, 12, 12)).sum().backward()
        assert net.norm2.passes.latest.statistics.isfinite().all()


def test_pre_activation_and_padded_shortcuts():
    """As in the authors' CIFAR networks: a norm behind an addition, statistics padded by zeros."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv0, self.kn0 = nn.Conv2d(3, 4, 3, padding=1), KN(4, q=0.25)
            self.conv1, self.kn1 = nn.Conv2d(4, 8, 3, 2, 1), KN(8, q=0.25)
            self.conv2, self.kn2 = nn.Conv2d(8, 8, 3, padding=1), KN(8, q=0.25)

        def forward(self, x):
            x = self.kn0(self.conv0(x)).relu()
            y = self.conv2(self.kn1(self.conv1(x)).relu())
            shortcut = F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 2, 2))
            return self.kn2(y + shortcut).relu()

    net = Net().double()
    link_norms(net)
    assert describe_links(net) == {
        "kn1": "conv1(relu(kn0))",
        "kn2": "conv2(relu(kn1)) + pad(relu(kn0))",
    }
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    summed = []
    net.kn2.register_forward_pre_hook(lambda _, inputs: summed.append(inputs[0]))
    torch.manual_seed(5)
    net(x)
    seeds = []
    torch.manual_seed(5)
    for _ in range(2):
        seeds.append(int(torch.randint(1 << 62, ())))
    noise = torch.randn(
        1, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seeds[1])
    )
    m0, v0 = net.kn0.passes.latest.statistics.detach()
    m1, v1 = (v.view(1, 8, 1, 1) for v in net.kn1.passes.latest.statistics.detach())
    z = net.conv2((m1 + v1.sqrt() * noise).relu())
    m, v = z.mean((0, 2, 3)), z.var((0, 2, 3), correction=0)
    m[2:6] += m0
    v[2:6] += v0
    seen_m, seen_v = summed[0].mean((0, 2, 3)), summed[0].var((0, 2, 3), correction=0)
    q = 0.25
    got = net.kn2.passes.latest.statistics
    torch.testing.assert_close(got[0], q * seen_m + (1 - q) * m)
    expected = q * seen_v + (1 - q) * v + q * (1 - q) * (seen_m - m) ** 2
    torch.testing.assert_close(got[1], expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3, stride=2, padding=1),
        dict(kernel_size=3, padding=6, dilation=6),
        dict(kernel_size=(1, 5), padding="same", dilation=2),
        dict(kernel_size=3, padding="valid"),
        dict(kernel_size=2, stride=3, groups=2),
        dict(kernel_size=1, padding=2),
        dict(kernel_size=3, padding=1, padding_mode="reflect"),
    ],
)
def test_synthetic_maps_have_the_size_that_the_convolution_needs(options):
    """Its output has the size of the layer's own input."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), KN(4), nn.ReLU(), nn.Conv2d(4, 6, **options))
    net.append(KN(6))
    link_norms(net)
    sizes, conv = [], net[3]
    forward = conv.forward

    def spy(x):
        y = forward(x)
        sizes.append(tuple(y.shape))
        return y

    conv.forward = spy
    net(torch.randn(2, 3, 15, 14))
    assert sizes[1] == (1, *sizes[0][1:])


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (dict(kernel_size=3, stride=2, padding=1, padding_mode="reflect"), 2),
        (dict(kernel_size=(4, 1), padding="same", padding_mode="reflect"), 3),
        (dict(kernel_size=5, stride=4, padding=2, padding_mode="circular"), 2),
        (dict(kernel_size=(4, 1), padding="same", padding_mode="circular"), 2),
        (dict(kernel_size=3, padding=1, padding_mode="replicate"), 1),
    ],
)
def test_synthetic_maps_are_large_enough_for_the_padding(options, size):
    """Of one value of the output; torch pads the network's own map, of this size, just so."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), KN(4), nn.Conv2d(4, 6, **options), KN(6))
    link_norms(net)
    sizes, forward = [], net[2].forward
    net[2].forward = lambda x: sizes.append(tuple(x.shape[2:])) or forward(x)[:, :, :1, :1]
    net(torch.randn(2, 3, size, size)).sum().backward()
    assert sizes == [(size, size), (size, size if isinstance(options["kernel_size"], int) else 1)]


@pytest.mark.parametrize("growth", [0, 4])
def test_predictions_compute_what_terms_share_once(growth, monkeypatch):
    """2^depth paths lead to the first norm in a ResNet and a DenseNet without further norms."""
    depth = 6

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm1 = nn.Conv2d(3, 4, 1), KN(4)
            *widths, last = (4 + growth * i for i in range(depth + 1))
            self.convs = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1) for width in widths)
            self.last, self.norm2 = nn.Conv2d(last, 5, 1), KN(5)

        def forward(self, x):
            x = self.norm1(self.first(x))
            for conv in self.convs:
                y = conv(x.relu())
                x = torch.cat([x, y], 1) if growth else x + y
            return self.norm2(self.last(x))

        def extract_feat(self, x):
            return [x]

        def auxiliary_head(self, features):
            return self(*features)  # a second run, which must be seen to be the same

    net, evaluated = Net(), []
    link_norms(net)
    forward = nn.Conv2d.forward
    monkeypatch.setattr(
        nn.Conv2d, "forward", lambda self, x: evaluated.append(self) or forward(self, x)
    )
    net(torch.randn(2, 3, 5, 5)).sum().backward()
    assert len(evaluated) == (depth + 2) + (depth + 1)
    assert net.first.weight.grad.isfinite().all()


def test_convolutions_put_in_the_place_of_others_are_followed():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), KN(4), nn.ReLU(), nn.Conv2d(4, 6, 3), KN(6, q=0.0))
    expected, new = copy.deepcopy(net), WSConv2d(4, 6, 3)
    link_norms(net)
    net[3], expected[3] = new, copy.deepcopy(new)
    link_norms(expected)
    outputs = []
    for model in (net, expected):
        torch.manual_seed(1)
        outputs.append(model(torch.arange(300.0).view(1, 3, 10, 10).sin()))
    torch.testing.assert_close(*outputs)
    net[3] = nn.Sequential(new)
    with pytest.raises(mmbcn.errors.UsageError, match=r"'3' of .* a Sequential is .*unlink_norms"):
        net(torch.randn(1, 3, 5, 5))
    unlink_norms(net)
    link_norms(net)
    assert describe_links(net) == {"4": "3.0(relu(1))"}
    net(torch.randn(1, 3, 5, 5)).sum().backward()


def test_hooks_of_convolutions_see_the_network_only():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), KN(4), nn.ReLU(), nn.Conv2d(4, 6, 3), KN(6))
    link_norms(net)
    calls = []
    net[3].register_forward_hook(lambda *_: calls.append(1))
    net(torch.randn(2, 3, 9, 9))
    assert len(calls) == 1


def test_models_that_cannot_be_linked_are_reported():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm1, self.norm2 = nn.Conv2d(3, 4, 1), KN(4), KN(4)

        def forward(self, x, scale):
            return self.norm2(self.norm1(self.conv(x)) * scale)

    with pytest.warns(UserWarning, match=r"2 of 2 KN .*\n  norm1: does not run \(TypeError: "):
        net = link_norms(Odd()) or Odd()
    net(torch.randn(2, 3, 4, 4), 2.0).sum().backward()
    with pytest.warns(UserWarning, match="the norm: .*no 2-d convolution"):
        convert_norm(nn.BatchNorm2d(4), "kn")
    conv, norm = nn.Conv2d(4, 4, 1), KN(4)
    twice = nn.Sequential(nn.Conv2d(3, 4, 1), KN(4), conv, norm, nn.ReLU(), conv, norm)
    with pytest.warns(UserWarning, match="1 of 2 KN .*\n  3: runs on several inputs"):
        link_norms(twice)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), KN(4), nn.ReLU(), KN(4, transition="linear"))
    with pytest.warns(UserWarning, match="3: a linear transition needs a convolution right before"):
        link_norms(net)
    net(torch.randn(2, 3, 4, 4)).sum().backward()


def test_learned_transitions_are_there_for_the_optimizer():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), KN(4), nn.ReLU(), nn.Conv2d(4, 6, 3))
    net.append(KN(6, transition="linear")).double()
    net[4].requires_grad_(False)
    link_norms(net)
    a, r = net[4].transition_weight, net[4].transition_noise
    assert (a.shape, r.shape, a.dtype) == ((6, 4), (6,), torch.float64)
    assert not a.requires_grad
    net[4].requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    net(x).pow(3).sum().backward()
    before = a.clone(), r.clone()
    optimizer.step()
    assert not any(torch.equal(*both) for both in zip(before, (a, r), strict=True))


@needs_mm
def test_folding_and_building_by_name():
    from mmcv.cnn import build_norm_layer, is_norm
    from mmcv.cnn.utils import fuse_conv_bn

    name, layer = build_norm_layer(dict(type="KN", q=0.95, requires_grad=False), 6, postfix=1)
    assert (name, type(layer), layer.q) == ("bn1", KN, 0.95)
    assert is_norm(layer)
    assert not layer.weight.requires_grad
    net = convert_norm(PlainResNet(), "kn")
    net(torch.randn(2, 3, 32, 32))
    x = torch.randn(2, 3, 32, 32)
    expected = net.eval()(x)
    fused = fuse_conv_bn(net)
    assert not any(isinstance(m, KN) for m in fused.modules())
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
