"""Published networks, stated independently in published.py, load through every door."""

import copy

import pytest
import torch

pytest.importorskip("mmseg")
from loading import (
    ROOT,
    assert_close_to_scale,
    assert_same_stages,
    backbone_cfg,
    evaluating,
    initialized,
    load_from,
    model_cfg,
    pretrained,
)
from mmengine.config import Config

from mmbcn import set_norm
from mmbcn.errors import UsageError

CASES = [
    # published network, --norm of the model, depth, deep stem
    ("bn_18", "bn", 18, False),
    ("bn_deep_18", "bn", 18, True),
    ("gn_18", "gn", 18, False),
    ("bcn_18", "bcn_ws", 18, False),
    ("bcn_18", "microbcn_ws", 18, False),
    ("bcn_18", "syncbcn", 18, False),  # weights come standardized
    ("gn_ws_50", "gn_ws", 50, False),
    ("bcn_50", "bcn_ws", 50, False),
]


@pytest.mark.parametrize(("kind", "norm", "depth", "deep"), CASES)
def test_backbone_computes_the_same(kind, norm, depth, deep, published, save):
    net = published(kind)
    name = "resnet50_gn_ws-15beedd8.pth" if kind == "gn_ws_50" else "checkpoint.pth"
    path = save(net.state_dict(), name)
    init = pretrained(path)
    cfg = backbone_cfg(norm, depth, "ResNetV1c" if deep else "ResNet", init_cfg=init)
    assert_same_stages(initialized(cfg), net)


def wrapped(state, form):
    prefixed = {f"module.{k}": v for k, v in state.items()}
    extra = dict(epoch=100, best_acc=torch.tensor(78.0), optimizer={"state": {}})
    return {
        "flat": state,
        "module": prefixed,
        "state_dict": {"state_dict": prefixed, **extra},
    }[form]


@pytest.mark.parametrize("form", ["flat", "module", "state_dict"])
@pytest.mark.parametrize("stage", ["pbn", "bn"])
def test_original_backbone_in_every_form(form, stage, published, save):
    net = published("bcn_18")
    state = {k.replace(".pbn.", f".{stage}."): v for k, v in net.state_dict().items()}
    if stage == "bn":  # the estimating batch norm of their README has a buffer more
        state["bn1.bn.estbn_moving_speed"] = torch.zeros(1)
    init = pretrained(save(wrapped(state, form)))
    assert_same_stages(initialized(backbone_cfg("bcn_ws", init_cfg=init)), net)


DOORS = ("model.init_cfg", "model.pretrained", "backbone.init_cfg", "backbone.pretrained")
KINDS = {  # published network: --norm of the model
    "bn_18": "bn",
    "gn_18": "gn",
    "gn_ws_18": "gn_ws",
    "bcn_18": "bcn_ws",
}


@pytest.mark.parametrize("door", [*DOORS, "load_from", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_door_loads_every_network(kind, door, published, save, tmp_path):
    net = published(kind)
    path = save(net.state_dict(), f"{kind}.pth")
    cfg = model_cfg(KINDS[kind])
    if door in ("load_from", "test"):  # a test of a backbone: it has no heads
        test = dict(testing=True, allow_partial=True) if door == "test" else {}
        model = load_from(cfg, path, tmp_path, **test)
    else:
        part, _, key = door.partition(".")
        owner = cfg if part == "model" else cfg["backbone"]
        owner[key] = pretrained(path) if key == "init_cfg" else path
        model = initialized(cfg)
    assert_same_stages(model.backbone, net)


def test_prefix(published, save):
    net = published("bcn_18")
    path = save({"state_dict": {f"encoder.net.{k}": v for k, v in net.state_dict().items()}})
    init = pretrained(path, prefix="encoder.net")
    assert_same_stages(initialized(backbone_cfg("bcn_ws", init_cfg=init)), net)


def test_zoo_name(published, monkeypatch, tmp_path):
    """open-mmlab://contrib/resnet50_gn_ws, whose formula is known by the name."""
    net = published("gn_ws_50")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(net.state_dict(), tmp_path / "checkpoints/resnet50_gn_ws-15beedd8.pth")
    init = pretrained("open-mmlab://contrib/resnet50_gn_ws")
    assert_same_stages(initialized(backbone_cfg("gn_ws", 50, init_cfg=init)), net)


def test_mm_checkpoints_of_classifiers_and_segmentors(published, save):
    """With backbone. before the names, into a segmentor and into a backbone."""
    net = published("bn_18")
    state = {f"backbone.{k}": v for k, v in net.state_dict().items() if not k.startswith("fc.")}
    state |= {"head.fc.weight": torch.zeros(1000, 512), "head.fc.bias": torch.zeros(1000)}
    path = save({"state_dict": state, "meta": {}})
    for prefix in (None, "backbone.", "backbone"):
        init = pretrained(path, prefix=prefix)
        assert_same_stages(initialized(backbone_cfg("bn", init_cfg=init)), net)
    cfg = model_cfg("bn")
    cfg["init_cfg"] = pretrained(path)
    assert_same_stages(initialized(cfg).backbone, net)


def test_mm_group_norm_names(published, save):
    """OpenMMLab's GN and GN + WS networks say gn1 where torchvision's say bn1."""
    net = published("gn_18")
    names = {k: k.replace("bn1.", "gn1.").replace("bn2.", "gn2.") for k in net.state_dict()}
    path = save({names[k]: v for k, v in net.state_dict().items()})
    init = pretrained(path)
    assert_same_stages(initialized(backbone_cfg("gn", init_cfg=init)), net)


def deeplab_cfg():
    """The shipped config of the authors' recipe, at depth 50."""
    cfg = Config.fromfile(ROOT / "configs/_base_/models/deeplabv3_r101_os16.py").model
    cfg.backbone.depth = 50
    return set_norm(cfg, "syncbcn_ws")


@pytest.mark.parametrize("ws", ["inside", "outside", "none"])
def test_original_deeplab(ws, published, save, tmp_path):
    """Every layer in its place, and the formula of weight standardization made the model's."""
    net = published("deeplab_50")
    cfg = deeplab_cfg()
    for part in (cfg.backbone, cfg.decode_head):
        if ws == "none":
            part.conv_cfg = None
        else:
            part.conv_cfg.eps_inside = ws == "inside"
    path = save(wrapped(net.state_dict(), "state_dict"))
    model = load_from(cfg, path, tmp_path)
    x = torch.randn(1, 3, 65, 97, generator=torch.Generator().manual_seed(9)).double()
    with torch.no_grad():
        ours = evaluating(model)._forward(x)
        theirs = copy.deepcopy(net).double()(x)
    assert_close_to_scale(ours, theirs)


def test_original_deeplab_as_backbone(published, save):
    net = published("deeplab_50")
    cfg = deeplab_cfg()["backbone"]
    cfg["init_cfg"] = pretrained(save(net.state_dict()))
    assert_same_stages(initialized(cfg), net)


def test_batch_norm_checkpoint_in_batch_channel_norm(published, save):
    """The batch stage is the checkpoint's BatchNorm: as torch computes it, with a group norm."""
    net = published("bn_18")
    init = pretrained(save(net.state_dict()))
    backbone = initialized(backbone_cfg("bcn", init_cfg=init))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = torch.group_norm(net.bn1(net.conv1(x)), 32)
        backbone.eval()
        ours = backbone.bn1(backbone.conv1(x))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_unknown_prefix_names_what_there_is(published, save):
    path = save({f"encoder.{k}": v for k, v in published("bn_18").state_dict().items()})
    init = pretrained(path, prefix="backbone.")
    with pytest.raises(UsageError, match=r"nothing under 'backbone\.'; it has: encoder"):
        initialized(backbone_cfg("bn", init_cfg=init))
