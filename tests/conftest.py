"""A training run of seconds: the smallest ResNet-18 DeepLabV3 on the embedded set."""

import copy
import uuid
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def _shipped():
    if not find_spec("mmseg"):
        pytest.skip("needs mmseg")
    from mmengine.config import Config

    return Config.fromfile(ROOT / "configs/deeplabv3/deeplabv3_r18_bcn_300_shapes-128x128.py")


@pytest.fixture
def tiny_config(tmp_path, monkeypatch, _shipped):
    """Makes configs of runs without validation, all data in this process."""
    # formatting a config takes longer than the run, and is done four times in it
    monkeypatch.setattr(type(_shipped), "pretty_text", property(repr))

    def make(norm="bcn", iters=4, size=48, batch=2, width=8, **options):
        cfg = copy.deepcopy(_shipped)
        loader = dict(
            batch_size=batch,
            num_workers=0,
            persistent_workers=False,
            dataset=dict(num_images=8 * batch, size=(size, size)),
        )
        cfg.merge_from_dict(
            dict(
                norm=norm,
                runner_type="mmbcn.NormRunner",
                launcher="none",
                work_dir=str(tmp_path / "work"),
                experiment_name=uuid.uuid4().hex,
                randomness=dict(seed=0),
                log_level="ERROR",
                model=dict(
                    data_preprocessor=dict(size=(size, size)),
                    backbone=dict(stem_channels=width, base_channels=width),
                    decode_head=dict(in_channels=8 * width, channels=16),
                    auxiliary_head=dict(in_channels=4 * width, channels=16),
                ),
                train_dataloader=loader,
                train_cfg=dict(max_iters=iters),
                val_dataloader=None,
                val_cfg=None,
                val_evaluator=None,
            )
        )
        cfg.default_hooks.checkpoint = None
        cfg.merge_from_dict(options)
        return cfg

    return make
