"""The two switches, on configs and on built modules."""

import copy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmbcn
from mmbcn import BCN, KN, MicroBCN, SyncBCN, WSConv2d, convert_norm, norm_names, set_norm
from mmbcn.errors import UsageError
from mmbcn.layers import IC, AffineInstanceNorm, AutoGroupNorm, BatchChannelNorm, FrozenBN, NoNorm

REPO = Path(mmbcn.__file__).parents[1]
needs_mm = pytest.mark.skipif(
    not all(map(find_spec, ("mmengine", "mmcv", "mmseg"))), reason="needs mmseg"
)
TYPES = {
    "bn": ("BN", nn.BatchNorm2d),
    "syncbn": ("SyncBN", nn.SyncBatchNorm),
    "frozen_bn": ("mmbcn.FrozenBN", FrozenBN),
    "gn": ("mmbcn.AutoGroupNorm", AutoGroupNorm),
    "ln": ("mmbcn.AutoGroupNorm", AutoGroupNorm),
    "in": ("mmbcn.AffineInstanceNorm", AffineInstanceNorm),
    "none": ("mmbcn.NoNorm", NoNorm),
    "bcn": ("mmbcn.BCN", BCN),
    "microbcn": ("mmbcn.MicroBCN", MicroBCN),
    "syncbcn": ("mmbcn.SyncBCN", SyncBCN),
    "kn": ("mmbcn.KN", KN),
    "ic": ("mmbcn.IC", IC),
}
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, FrozenBN, NoNorm, IC)


def shipped(path="deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py"):
    import mmseg
    from mmengine import Config

    model = Config.fromfile(f"{mmseg.__path__[0]}/.mim/configs/{path}").model
    model.pretrained = None
    return model


@pytest.fixture(scope="module")
def shipped_deeplab():
    return shipped()


@pytest.fixture
def deeplab(shipped_deeplab):
    """The shipped config, narrower."""
    model = copy.deepcopy(shipped_deeplab)
    model.backbone.update(stem_channels=8, base_channels=8)
    model.decode_head.update(in_channels=64, channels=16)
    model.auxiliary_head.update(in_channels=32, channels=8)
    return model


def build(model):
    from mmengine.registry import DefaultScope
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(model)


def norm_layers(net):
    """Outermost norms: what sits inside another norm is not counted."""
    inner = {m.bn for m in net.modules() if isinstance(m, (BatchChannelNorm, IC))}
    return [m for m in net.modules() if isinstance(m, NORM_LAYERS) and m not in inner]


def test_names():
    assert norm_names() == [n + s for n in TYPES for s in ("", "_ws")]


# --- configs -------------------------------------------------------------------------------------


@needs_mm
@pytest.mark.parametrize("name", norm_names())
def test_switches_a_shipped_config(deeplab, name):
    assert set_norm(deeplab, name) is deeplab
    base, ws = name.removesuffix("_ws"), name.endswith("_ws")
    kind, cls = TYPES[base]
    for part in (deeplab.backbone, deeplab.decode_head, deeplab.auxiliary_head):
        assert part.norm_cfg.type == kind
        assert part.norm_cfg.requires_grad is True
        assert (part.get("conv_cfg") or {}).get("type") == ("mmbcn.WSConv2d" if ws else None)
    net = build(deeplab)
    layers = norm_layers(net)
    assert len(layers) == (30 if base == "ic" else 29)  # not for the image, but for 2 classifiers
    assert all(isinstance(m, cls) for m in layers)
    if base == "ln":
        assert all(m.num_groups == 1 for m in layers)
    if base in ("gn", "bcn", "microbcn", "syncbcn"):
        assert {(m.num_channels, m.num_groups) for m in layers} == {
            *((4, 2), (8, 4), (16, 8), (32, 16), (64, 32))
        }
    convs = {type(m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert convs == ({WSConv2d, nn.Conv2d} if ws else {nn.Conv2d})
    plain = {n for n, m in net.named_modules() if type(m) is nn.Conv2d}
    assert "decode_head.conv_seg" in plain
    if ws:
        assert plain == {"decode_head.conv_seg", "auxiliary_head.conv_seg"}


@needs_mm
@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("bn", 2),
        ("bcn", 1),
        ("bcn_ws", 2),
        ("microbcn_ws", 1),
        ("gn", 1),
        ("in", 1),
        ("syncbcn", 1),
        ("frozen_bn", 1),
        ("ln_ws", 1),
        ("kn", 1),
        ("kn_ws", 2),
    ],
)
def test_switched_configs_train(deeplab, name, batch):
    net = build(set_norm(deeplab, name)).train()
    net.init_weights()
    x = torch.randn(batch, 3, 64, 64)
    y = net(x, mode="tensor")
    assert y.shape == (batch, 19, 8, 8)
    y.square().mean().backward()
    assert y.isfinite().all()
    grads = {n: p.grad for n, p in net.named_parameters() if "auxiliary" not in n}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert grads["backbone.stem.0.weight"].any()


@needs_mm
def test_a_shipped_config_cannot_train_on_one_image_with_bn(deeplab):
    net = build(set_norm(deeplab, "bn")).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(torch.randn(1, 3, 64, 64), mode="tensor")


def test_whole_dicts_are_replaced():
    cfg = dict(type="X", norm_cfg=dict(type="GN", num_groups=32, requires_grad=False))
    set_norm(cfg, "bn")
    assert cfg == dict(type="X", norm_cfg=dict(type="BN", requires_grad=True))
    cfg = dict(type="X", norm_cfg=dict(type="BN", momentum=0.01))
    set_norm(cfg, "bcn")
    assert cfg["norm_cfg"] == dict(type="mmbcn.BCN", num_groups="auto", requires_grad=True)


def test_places():
    def bn():
        return dict(type="SyncBN", requires_grad=True)

    shared = bn()
    cfg = dict(
        type="Model",
        backbone=dict(type="A", cell=dict(deep=[dict(norm_cfg=bn()), (dict(norm_cfg=bn()),)])),
        decode_head=[dict(type="B", norm_cfg=shared), dict(type="C", norm_cfg=shared)],
        many=dict(norm_cfg=[bn(), bn()]),
        none=dict(norm_cfg=None),
        loss_decode=dict(norm_cfg=bn()),
        init_cfg=dict(norm_cfg=bn()),
    )
    set_norm(cfg, "microbcn_ws")
    deep = cfg["backbone"]["cell"]["deep"]
    places = [deep[0], deep[1][0], *cfg["decode_head"]]
    new = dict(type="mmbcn.MicroBCN", num_groups="auto", requires_grad=True)
    for place in places:
        assert place["norm_cfg"] == new
        assert place["conv_cfg"] == dict(type="mmbcn.WSConv2d")
    assert cfg["decode_head"][0]["norm_cfg"] is not cfg["decode_head"][1]["norm_cfg"]
    assert cfg["many"]["norm_cfg"] == [new, new]
    assert cfg["none"] == dict(norm_cfg=None)
    assert cfg["loss_decode"] == cfg["init_cfg"] == dict(norm_cfg=bn())


def test_back_from_weight_standardization():
    cfg = dict(type="X", norm_cfg=dict(type="BN"))
    set_norm(set_norm(cfg, "bcn_ws"), "bn")
    assert cfg["norm_cfg"] == dict(type="BN", requires_grad=True)
    assert cfg["conv_cfg"] is None
    cfg = dict(type="X", norm_cfg=dict(type="BN"), conv_cfg=dict(type="DCNv2"))
    set_norm(cfg, "bcn")
    assert cfg["conv_cfg"] == dict(type="DCNv2")
    with pytest.raises(UsageError, match="DCNv2"):
        set_norm(cfg, "bn_ws")
    assert cfg["norm_cfg"]["type"] == "mmbcn.BCN"  # a refusal changes nothing


@needs_mm
def test_batch_norm_that_no_config_names():
    cfg = dict(type="EncoderDecoder", backbone=dict(type="ResNet", depth=18, base_channels=8))
    set_norm(cfg, "bcn")
    assert cfg["backbone"]["norm_cfg"]["type"] == "mmbcn.BCN"
    assert "norm_cfg" not in cfg
    net = build(dict(cfg["backbone"], stem_channels=8))
    assert {type(m) for m in norm_layers(net)} == {BCN}


@needs_mm
def test_layer_norms_of_transformers_stay():
    swin = shipped("swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py")
    before = copy.deepcopy(swin.backbone)
    set_norm(swin, "bcn")
    assert swin.backbone == before
    assert swin.backbone.norm_cfg.type == "LN"
    assert swin.decode_head.norm_cfg.type == "mmbcn.BCN"
    assert swin.auxiliary_head.norm_cfg.type == "mmbcn.BCN"


@needs_mm
def test_weight_standardization_is_refused_where_it_would_be_ignored():
    path = "stdc/stdc1_4xb12-80k_cityscapes-512x1024.py"
    cfg = shipped(path)
    before = copy.deepcopy(cfg)
    with pytest.raises(UsageError, match=r"STDC.* takes no conv_cfg"):
        set_norm(cfg, "bcn_ws")
    assert cfg == before
    set_norm(cfg, "bcn")
    assert cfg.backbone.backbone_cfg.norm_cfg.type == "mmbcn.BCN"
    assert [h.norm_cfg.type for h in cfg.auxiliary_head] == ["mmbcn.BCN"] * 3


def test_mistakes():
    cfg = dict(type="X", norm_cfg=dict(type="BN"))
    for convert in (lambda n: set_norm(cfg, n), lambda n: convert_norm(nn.BatchNorm2d(4), n)):
        with pytest.raises(UsageError, match=r"'bnc'.*Known: .*'?microbcn_ws"):
            convert("bnc")
        with pytest.raises(UsageError, match="did you mean 'microbcn'"):
            convert("MicroBCN")
        with pytest.raises(UsageError, match="unknown norm"):
            convert("_ws")
    assert cfg == dict(type="X", norm_cfg=dict(type="BN"))
    for empty in ({}, dict(type="X"), dict(head=dict(norm_cfg=dict(type="LN")))):
        with pytest.raises(UsageError, match="no norm_cfg"):
            set_norm(empty, "bcn")
    with pytest.raises(TypeError, match="model dict"):
        set_norm([cfg], "bcn")


@needs_mm
def test_one_line_in_a_config_file(tmp_path, shipped_deeplab):
    """Switched on reading; the dumped file builds in a process that never imports mmbcn."""
    import mmseg
    from mmengine import Config

    base = (
        f"{mmseg.__path__[0]}/.mim/configs/deeplabv3/"
        "deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py"
    )
    child, dumped = tmp_path / "child.py", tmp_path / "dumped.py"
    child.write_text(
        f"_base_ = {base!r}\nfrom mmbcn import set_norm\nmodel = set_norm(_base_.model, 'bcn')\n"
    )
    config = Config.fromfile(child)
    expected = set_norm(copy.deepcopy(shipped_deeplab), "bcn")
    for part in ("backbone", "decode_head", "auxiliary_head"):
        assert config.model[part] == expected[part]
        assert config.model[part].norm_cfg.type == "mmbcn.BCN"
    config.dump(dumped)
    code = (
        f"import sys; sys.path.insert(0, {str(REPO)!r})\n"
        "from mmengine import Config\n"
        "model = Config.fromfile(sys.argv[1]).model\n"
        "import mmseg.models\n"
        "from mmengine.registry import init_default_scope\n"
        "from mmseg.registry import MODELS\n"
        "init_default_scope('mmseg')\n"
        "model.pretrained = None\n"
        "assert 'mmbcn' not in sys.modules\n"
        "net = MODELS.build(model)\n"
        "print(sum(type(m).__name__ == 'BCN' for m in net.modules()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, dumped], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "29"


# --- built modules -------------------------------------------------------------------------------


def randomize(net, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.randn(value.shape, generator=g).abs() + 0.3)
    return net


def cnn(norm=nn.BatchNorm2d):
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), norm(6), nn.ReLU(), nn.Conv2d(6, 4, 1), norm(4), nn.ReLU()
    )
    net.append(nn.Conv2d(4, 2, 1))
    return randomize(net)


def image(n=2):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [name for name in norm_names() if not name.startswith("ic")])
def test_convert_reaches_every_layer(name):
    net, ws = cnn(), name.endswith("_ws")
    parameters = [net[i].weight for i in (0, 3, 6)]
    assert convert_norm(net, name) is net
    kinds = [type(net[i]) for i in (0, 1, 3, 4, 6)]
    norm, conv = TYPES[name.removesuffix("_ws")][1], WSConv2d if ws else nn.Conv2d
    assert kinds == [conv, norm, conv, norm, nn.Conv2d]
    for i, parameter in zip((0, 3, 6), parameters, strict=True):
        assert net[i].weight is parameter
    if not name.startswith("syncbn"):
        net.train()(image()).sum().backward()
        assert net[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["bn", "frozen_bn", "syncbn", "kn"])
def test_convert_keeps_the_function_of_a_bn_network(name):
    net = cnn().eval()
    expected = net(image())
    torch.testing.assert_close(convert_norm(net, name)(image()), expected)


@pytest.mark.parametrize("name", ["bcn", "microbcn", "syncbcn"])
def test_convert_puts_a_bn_into_the_batch_stage(name):
    old = randomize(nn.BatchNorm2d(8, eps=1e-3, momentum=0.02)).double().eval()
    old.num_batches_tracked.fill_(5)
    old.weight.requires_grad_(False)
    old.bias.requires_grad_(False)
    new = convert_norm(old, name)  # a root norm is returned
    assert type(new) is TYPES[name][1]
    assert (new.eps, new.bn.eps, new.momentum, new.training) == (1e-3, 1e-3, 0.02, False)
    assert int(new.bn.num_batches_tracked) == 5
    assert not any(p.requires_grad for p in new.parameters())
    assert {p.dtype for p in new.parameters()} == {torch.float64}
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(new(x), F.group_norm(old(x), 4, eps=1e-3))


def test_convert_back_keeps_the_batch_stage():
    layer = randomize(BCN(6, 3)).eval()
    x = torch.randn(2, 6, 4, 4)
    expected = layer.bn(x)
    for name in ("bn", "frozen_bn"):
        torch.testing.assert_close(convert_norm(copy.deepcopy(layer), name)(x), expected)
    gn = randomize(nn.GroupNorm(3, 6))
    bn = convert_norm(copy.deepcopy(gn), "bn")
    assert torch.equal(bn.weight, gn.weight)
    assert torch.equal(bn.bias, gn.bias)


@pytest.mark.parametrize(("old", "new"), [(BCN, "microbcn"), (MicroBCN, "bcn"), (SyncBCN, "bcn")])
def test_convert_between_batch_channel_norms_keeps_everything(old, new):
    net = cnn(lambda c: old(c, "auto")).eval()
    state, expected = copy.deepcopy(net.state_dict()), net(image())
    convert_norm(net, new)
    assert type(net[1]) is TYPES[new][1]
    assert net.state_dict().keys() == state.keys()
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]), key
    torch.testing.assert_close(net(image()), expected)


@pytest.mark.parametrize("old", [BCN, MicroBCN])
def test_convert_between_batch_channel_norms_keeps_the_groups(old):
    layer = randomize(old(8, num_groups=2)).eval()
    x = torch.randn(2, 8, 4, 4)
    expected, state = layer(x), copy.deepcopy(layer.state_dict())
    new = convert_norm(layer, "syncbcn")
    assert new.num_groups == 2
    assert torch.equal(new.weight, state["weight"])
    torch.testing.assert_close(new(x), expected)


def test_convert_from_weight_standardization_keeps_the_function():
    net = convert_norm(cnn(), "bcn_ws").eval()
    expected = net(image())
    convert_norm(net, "bcn")
    assert [type(net[i]) for i in (0, 3, 6)] == [nn.Conv2d] * 3
    torch.testing.assert_close(net(image()), expected, rtol=1e-4, atol=1e-5)


def test_convert_leaves_layers_without_a_norm_behind():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.head = nn.Conv2d(4, 5, 1)  # followed by a norm of another width
            self.norm = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 2)
            self.ln = nn.LayerNorm(4)
            self.up = nn.ConvTranspose2d(4, 4, 2)
            self.last = nn.BatchNorm2d(4)

    net = convert_norm(Two(), "bcn_ws")
    kinds = {k: type(m) for k, m in net.named_children()}
    assert kinds == dict(
        conv=WSConv2d,
        bn=BCN,
        head=nn.Conv2d,
        norm=BCN,
        fc=nn.Linear,
        ln=nn.LayerNorm,
        up=nn.ConvTranspose2d,
        last=BCN,
    )


def test_convert_shared_modules():
    norm, conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
    net = convert_norm(nn.Sequential(conv, norm, nn.Sequential(conv, norm)), "bcn_ws")
    assert net[1] is net[2][1]
    assert net[0] is net[2][0]
    assert (type(net[0]), type(net[1])) == (WSConv2d, BCN)


def test_convert_nothing():
    for net in (nn.Conv2d(3, 4, 1), nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))):
        with pytest.raises(UsageError, match="found no BatchNorm"):
            convert_norm(net, "bcn")


def test_convert_refuses_filters_of_one_weight():
    net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(UsageError, match=r"0: .*at least 2 weights"):
        convert_norm(net, "bn_ws")
    assert type(net[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("name", ["bn", "bcn", "gn", "frozen_bn"])
def test_convert_norms_that_end_in_an_activation(name):
    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), nn.ReLU()

        def forward(self, x):
            return self.act(self.drop(super().forward(x)))

    old = randomize(nn.Sequential(nn.Conv2d(3, 6, 1), BatchNormAct2d(6))).eval()
    plain = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)).eval()
    plain.load_state_dict(old.state_dict())
    expected = convert_norm(plain, name)(image()).relu()
    assert (expected == 0).any()
    net = convert_norm(old, name)
    for other in (net, copy.deepcopy(net)):
        torch.testing.assert_close(other(image()), expected)


@pytest.mark.parametrize("name", ["bn", "bcn"])
@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm3d, nn.InstanceNorm2d])
def test_convert_other_dimensions(cls, name):
    layer = convert_norm(nn.Sequential(cls(4)), name)[0]
    shape = {nn.BatchNorm1d: (3, 4), nn.BatchNorm3d: (2, 4, 2, 2, 2)}.get(cls, (2, 4, 3, 3))
    assert layer(torch.randn(shape)).shape == shape


def test_convert_torchvision_like_frozen_bn():
    class FrozenBatchNorm2d(nn.Module):
        eps = 1e-5

        def __init__(self, channels):
            super().__init__()
            for name, value in dict(
                weight=2.0, bias=1.0, running_mean=0.5, running_var=3.0
            ).items():
                self.register_buffer(name, torch.full((channels,), value))

    layer = convert_norm(FrozenBatchNorm2d(4), "bn").eval()
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(layer(x), (x - 0.5) / (3 + 1e-5) ** 0.5 * 2 + 1)


@pytest.mark.parametrize("name", ["bn", "bcn", "gn", "none"])
def test_convert_frozen_bn_that_has_its_eps_in_its_forward(name):
    class FrozenBatchNorm2d(nn.Module):  # as DETR's
        def __init__(self, channels):
            super().__init__()
            for key in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(key, torch.ones(channels))

    assert getattr(convert_norm(FrozenBatchNorm2d(4), name), "eps", 1e-5) == 1e-5


@pytest.mark.parametrize("name", ["bn", "bcn", "gn", "none"])
def test_convert_norms_without_parameters_takes_the_dtype_of_the_layer_before(name):
    net = nn.Sequential(nn.Conv2d(3, 4, 1).double(), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1))
    net = convert_norm(net, name)
    assert {p.dtype for p in net[1].parameters()} == {torch.float64}
    assert net[2].weight.dtype == torch.float32


def test_convert_within_a_kind_keeps_its_settings():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), mmbcn.KN(8, q=0.9), nn.ReLU(),
        nn.Conv2d(8, 8, 1), mmbcn.KN(8, q=0.9, transition="linear"),
    )  # fmt: skip
    mmbcn.layers.link_norms(net)
    with torch.no_grad():
        net[4].transition_weight.mul_(3)
    learned = net[4].state_dict()
    net = convert_norm(net, "kn_ws")
    assert (net[1].q, net[4].q, net[4].transition) == (0.9, 0.9, "linear")
    assert net[4].state_dict().keys() == learned.keys()
    assert all(torch.equal(value, learned[key]) for key, value in net[4].state_dict().items())
    assert convert_norm(net, "bn")[4].state_dict().keys() == nn.BatchNorm2d(8).state_dict().keys()
    assert convert_norm(MicroBCN(8, 2, warmup=False), "microbcn_ws").warmup is False
    assert convert_norm(MicroBCN(8, 2, sync=True), "microbcn").sync is True
    assert convert_norm(nn.GroupNorm(2, 16), "gn_ws").num_groups == 2
    for other in (nn.GroupNorm(1, 64), nn.GroupNorm(64, 64), nn.BatchNorm2d(64)):
        assert convert_norm(other, "gn").num_groups == 32


@pytest.mark.parametrize("name", ["bn", "bcn", "gn"])
@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_convert_keeps_which_parameters_train(name, trained):
    def modes(layer):
        return tuple(p.requires_grad for p in (layer.weight, layer.bias))

    old = nn.BatchNorm2d(4)
    for parameter, mode in zip((old.weight, old.bias), trained, strict=True):
        parameter.requires_grad_(mode)
    new = convert_norm(old, name)
    assert modes(new.bn if name == "bcn" else new) == trained
    if name == "bcn":
        assert modes(new) == (False, False)
        assert modes(convert_norm(new, "bn")) == trained


@pytest.mark.parametrize("name", [n for n in norm_names() if not n.startswith("ic")])
def test_convert_on_the_meta_device(name):
    """A model that has no values yet; back, as two kinds of state are read."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        net.append(nn.Conv2d(16, 8, 1)).append(nn.BatchNorm2d(8))
    for one in (name, "bcn_ws", name):
        net = convert_norm(net, one)
        assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
    assert net.eval()(torch.zeros(2, 3, 9, 9, device="meta")).shape == (2, 8, 7, 7)


def test_convert_loses_nothing():
    class Doubling(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    patched = nn.BatchNorm2d(4)
    patched.forward = lambda x: x
    hooked = nn.BatchNorm2d(4)
    handle = hooked.register_forward_hook(lambda layer, x, y: y.abs())
    conv = nn.Conv2d(4, 4, 1)
    for layers, name, message in (
        ([Doubling(4)], "bcn", "would lose what 1, a Doubling, does in its own forward"),
        ([patched], "bcn", "would lose what 1, a BatchNorm2d, does in its own forward"),
        ([hooked], "bcn", "1 has forward hooks"),
        (
            [nn.utils.weight_norm(copy.deepcopy(conv)), nn.BatchNorm2d(4)],
            "bcn_ws",
            "of 1: it computes",
        ),
        (
            [nn.utils.parametrizations.spectral_norm(conv), nn.GroupNorm(2, 4)],
            "gn_ws",
            "of 1: it computes",
        ),
    ):
        net = nn.Sequential(nn.BatchNorm2d(4), *layers)
        with pytest.raises(UsageError, match=message):
            convert_norm(net, name)
        assert type(net[0]) is nn.BatchNorm2d
        assert list(net)[1:] == layers
    handle.remove()
    assert type(convert_norm(nn.Sequential(hooked), "bcn")[0]) is mmbcn.BCN

    class Renamed(nn.BatchNorm2d):  # inherits the forward
        pass

    assert type(convert_norm(nn.Sequential(Renamed(4)), "bcn")[0]) is mmbcn.BCN


def test_convert_logs_the_convolutions_that_stay_plain(caplog):
    """It goes by the order of definition: here both norms stand behind both convolutions."""
    caplog.set_level("INFO", "mmbcn.norms")
    parts = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    net = convert_norm(nn.Sequential(*parts), "bn_ws")
    assert [type(layer) for layer in net[:2]] == [nn.Conv2d, mmbcn.WSConv2d]
    assert [r.getMessage() for r in caplog.records] == [
        "convert_norm: weights that are not standardized: 0"
    ]
    caplog.clear()
    convert_norm(nn.Sequential(*convert_norm(nn.Sequential(*parts[1:]), "bn_ws")), "bcn_ws")
    assert not caplog.records


def test_convert_keeps_the_affine_free_norm_trainable():
    layer = convert_norm(nn.BatchNorm2d(4, affine=False), "bcn")
    assert layer.bn.weight.eq(1).all()
    assert all(p.requires_grad for p in layer.parameters())


@needs_mm
def test_a_package_that_does_not_import_is_passed_over(monkeypatch):
    """As mmdet, installed beside an mmcv without compiled operations."""
    from mmengine.registry import MODELS

    original, asked = MODELS.get, []

    def get(name):
        if name.startswith("mmdet."):
            asked.append(name)
            raise ModuleNotFoundError("No module named 'mmcv._ext'")
        return original(name)

    monkeypatch.setattr(MODELS, "get", get)
    monkeypatch.setattr(mmbcn.norms, "find_spec", lambda name: name != "mmpretrain")
    monkeypatch.setattr(mmbcn.norms, "_UNUSABLE", set())
    cfg = dict(type="NoSuchNet", backbone=dict(type="ResNet", depth=18), neck=dict(type="NoNeck"))
    set_norm(cfg, "bcn")
    assert cfg["backbone"]["norm_cfg"]["type"] == "mmbcn.BCN"
    assert asked == ["mmdet.NoSuchNet"]  # once, not for each layer
