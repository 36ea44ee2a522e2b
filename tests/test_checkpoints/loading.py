"""Loads checkpoints as the runs and the tools do, and compares with the published networks."""

import copy
import uuid
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS

from mmbcn import NormRunner, set_norm

ROOT = Path(__file__).parents[2]
init_default_scope("mmseg")


def backbone_cfg(norm, depth=18, kind="ResNet", **options):
    """A ResNet as the config's ``--norm`` would make it."""
    cfg = dict(type=kind, depth=depth, norm_cfg=dict(type="BN"), style="pytorch", **options)
    return set_norm(dict(backbone=cfg), norm)["backbone"]


def model_cfg(norm, depth=18, classes=19, **backbone):
    head = dict(channels=32, num_classes=classes, norm_cfg=dict(type="BN"))
    cin = 512 if depth == 18 else 2048
    cfg = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(type="SegDataPreProcessor"),
        backbone=dict(type="ResNet", depth=depth, norm_cfg=dict(type="BN"), **backbone),
        decode_head=dict(type="FCNHead", in_channels=cin, in_index=3, num_convs=1, **head),
        auxiliary_head=dict(type="FCNHead", in_channels=cin // 2, in_index=2, num_convs=1, **head),
    )
    return set_norm(cfg, norm)


def evaluating(model):
    model = copy.deepcopy(model).double()
    model.eval()  # mm's return None
    return model


def assert_same_stages(backbone, net):
    """The outputs of all stages, in float64: what differs is the weights as they were loaded."""
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(9)).double()
    with torch.no_grad():
        ours = evaluating(backbone)(x)
        theirs = copy.deepcopy(net).double().stages(x)
    for mine, expected in zip(ours, theirs, strict=True):
        assert_close_to_scale(mine, expected)


def assert_close_to_scale(ours, theirs):
    """Equal to 1e-5 of the largest value."""
    scale = theirs.abs().max().item()
    assert theirs.std() > 0.05 * scale  # something to compare
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(scale, 1))


def initialized(cfg):
    model = MODELS.build(ConfigDict(cfg))
    model.init_weights()
    return model


def pretrained(path, **options):
    return dict(type="Pretrained", checkpoint=path, **options)


def load_from(cfg, path, tmp_path, testing=False, **options):
    """What a run does with load_from, and tools/test.py (``testing``), without data."""
    config = dict(model=cfg, load_from=path, default_scope="mmseg", work_dir=str(tmp_path / "w"))
    config |= dict(options, experiment_name=uuid.uuid4().hex)
    runner = NormRunner.from_cfg(Config(config))
    runner.testing = testing  # as NormRunner.test sets it
    runner.load_or_resume()
    return runner.model
