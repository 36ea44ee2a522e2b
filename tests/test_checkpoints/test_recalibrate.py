"""Recalibration of a segmentor's checkpoint, against training passes and closed forms."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
from PIL import Image
from torch.nn.functional import conv2d

from mmbcn import set_norm
from mmbcn.analysis.images import KeptBatches, SplitImages
from mmbcn.analysis.recalibrate import recalibrate
from mmbcn.errors import UsageError

init_default_scope("mmseg")
MEAN, STD = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
SIZES = [(40, 48), (40, 48), (40, 64), (56, 48), (40, 48)]


@pytest.fixture
def folder(tmp_path):
    """Images of different sizes and brightness, without labels' content mattering."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i, size in enumerate(SIZES):
            values = rng.normal(40 * i + 30, 8 * i + 5, (*size, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(values).save(tmp_path / "images" / split / f"{i}.png")
            Image.fromarray(np.zeros(size, np.uint8)).save(tmp_path / "labels" / split / f"{i}.png")
    return tmp_path


def config(folder, norm="bn", **test_cfg):
    head = dict(type="FCNHead", num_convs=1, channels=8, num_classes=2, norm_cfg=dict(type="BN"))
    model = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(
            type="SegDataPreProcessor", mean=MEAN, std=STD, bgr_to_rgb=True, size=(32, 32)
        ),
        backbone=dict(type="ResNet", depth=18, base_channels=8, norm_cfg=dict(type="BN")),
        decode_head=dict(in_channels=64, in_index=3, dropout_ratio=0.5, **head),
        auxiliary_head=dict(in_channels=32, in_index=2, **head),
        test_cfg=test_cfg or dict(mode="whole"),
    )

    def loader(split, *steps):
        pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), *steps]
        pipeline.append(dict(type="PackSegInputs"))
        dataset = dict(
            type="BaseSegDataset",
            data_root=str(folder),
            data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"labels/{split}"),
            img_suffix=".png",
            seg_map_suffix=".png",
            metainfo=dict(classes=("a", "b")),
            pipeline=pipeline,
        )
        return dict(batch_size=1, num_workers=0, dataset=dataset)

    crop = dict(type="RandomCrop", crop_size=(16, 16))
    return Config(
        dict(
            default_scope="mmseg",
            model=set_norm(model, norm),
            train_dataloader=loader("train", crop),
            test_dataloader=loader("val"),
        )
    )


def network(cfg):
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model))
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, 0.5, 0.5)
    return model


def checkpoint(cfg):
    return {
        "meta": dict(cfg=cfg.pretty_text, iter=7),
        "state_dict": network(cfg).state_dict(),
        "optimizer": {"lr": 0.1},
    }


def pixels(folder, indices=(0, 1, 2, 3, 4)):
    """The training images as the network gets them, one by one, by this file's own arithmetic."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    for i in indices:
        values = np.array(Image.open(folder / "images/train" / f"{i}.png"))
        yield ((torch.from_numpy(values).permute(2, 0, 1).float() - mean) / std)[None]


def is_statistic(key):
    return key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


@pytest.mark.parametrize("norm", ["bn", "bcn", "microbcn"])
def test_first_layer_is_the_closed_form_over_images_of_unequal_sizes(folder, norm):
    cfg = config(folder, norm)
    given = checkpoint(cfg)
    before = copy.deepcopy(given)
    result, done = recalibrate(cfg, given, "it", batch_size=2)
    state = result["state_dict"]
    outputs = [
        conv2d(x.double(), state["backbone.conv1.weight"].double(), stride=2, padding=3)
        for x in pixels(folder)
    ]
    values = torch.cat([o.transpose(0, 1).reshape(64, -1) for o in outputs], 1)
    stage = "backbone.bn1" if norm == "bn" else "backbone.bn1.bn"
    var = values.var(1, correction=0 if norm == "microbcn" else 1)
    torch.testing.assert_close(
        state[f"{stage}.running_mean"].double(), values.mean(1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(state[f"{stage}.running_var"].double(), var, rtol=1e-5, atol=1e-6)
    assert done.changes[0].values == values.shape[1]
    assert len(done.changes) == 25  # 21 in the backbone, 2 in each head
    assert not done.unreached
    # All else as it was, bit for bit
    for key, value in before["state_dict"].items():
        assert torch.equal(given["state_dict"][key], value)
        assert is_statistic(key) or torch.equal(state[key], value)
    assert result["optimizer"] == {"lr": 0.1}
    assert result["meta"]["calibrated"] == "5 of 5 training images"
    assert result["meta"]["iter"] == 7
    assert "calibrated" not in given["meta"]


@pytest.mark.parametrize("norm", ["bn", "syncbcn"])
def test_whole_network_equals_one_huge_batch(folder, norm):
    cfg = config(folder, norm)
    for index in (2, 3):  # leave images of one size
        for kind in ("images", "labels"):
            (folder / kind / "train" / f"{index}.png").unlink()
    model = network(config(folder, "bcn" if norm == "syncbcn" else norm))
    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            m.momentum = 1.0
    with torch.no_grad():
        features = model.train().extract_feat(torch.cat(list(pixels(folder, (0, 1, 4)))))
        for head in (model.decode_head, model.auxiliary_head):
            head(features)
    expected = model.state_dict()
    given = checkpoint(cfg)
    result, _ = recalibrate(cfg, given, "it", batch_size=2)
    compared = [k for k in expected if k.rpartition(".")[2] in ("running_mean", "running_var")]
    assert len(compared) == 50
    for key in compared:
        torch.testing.assert_close(
            result["state_dict"][key], expected[key], rtol=1e-4, atol=1e-4, msg=key
        )
    again, done = recalibrate(cfg, result, "it", batch_size=3)
    assert max(c.mean_shift for c in done.changes) < 1e-5
    for key in compared:
        torch.testing.assert_close(again["state_dict"][key], result["state_dict"][key])


def test_chosen_images_are_spread_over_the_training_set(folder):
    images = SplitImages(config(folder), num_images=2, batch_size=4)
    names = [Path(s.img_path) for batch in images for s in batch["data_samples"]]
    assert [n.name for n in names] == ["0.png", "2.png"]
    assert {n.parent.name for n in names} == {"train"}
    assert (images.num_images, images.total) == (2, 5)
    whole = list(SplitImages(config(folder), num_images=99, batch_size=4))
    assert [tuple(b["inputs"][0].shape[1:]) for b in whole] == [*SIZES[1:]]
    assert [len(b["inputs"]) for b in whole] == [2, 1, 1, 1]
    assert all(i.dtype == torch.uint8 for b in whole for i in b["inputs"])


@pytest.mark.parametrize(("limit", "loads"), [(72, 1), (71, 3)])
def test_batches_stay_in_memory_up_to_a_limit(limit, loads):
    started = []

    class Loader:
        def __iter__(self):
            started.append(self)
            for _ in range(3):
                yield dict(inputs=[torch.zeros(3, 2, 2, dtype=torch.uint8)] * 2)

    kept = KeptBatches(Loader(), limit)
    next(iter(kept))  # an end before all were seen keeps nothing
    assert [len(list(kept)) for _ in range(3)] == [3] * 3
    assert len(started) == 1 + loads


def test_windows_are_those_of_sliding_inference(folder):
    cfg = config(folder, mode="slide", crop_size=(32, 32), stride=(20, 20))
    model = network(cfg).eval()
    seen = []
    model.encode_decode = lambda x, metas: (seen.append(x.clone()), x[:, :2])[1]
    [image] = pixels(folder, (3,))
    model.slide_inference(image, [dict(img_shape=SIZES[3], ori_shape=SIZES[3])])
    raw = [b for b in SplitImages(cfg, None, 1) if b["data_samples"][0].img_path.endswith("3.png")]
    assert len(raw) == len(seen) == 6
    for batch, window in zip(raw, seen, strict=True):
        torch.testing.assert_close(model.data_preprocessor(batch, False)["inputs"], window)


def test_half_precision_weights_keep_their_bits(folder):
    cfg = config(folder)
    given = checkpoint(cfg)
    given["state_dict"] = {
        k: v.half() if v.is_floating_point() else v for k, v in given["state_dict"].items()
    }
    state = recalibrate(cfg, given, "it", num_images=1, one_pass=True)[0]["state_dict"]
    for key, value in given["state_dict"].items():
        assert state[key].dtype == value.dtype
        assert is_statistic(key) or torch.equal(state[key], value)


def test_checkpoint_without_the_auxiliary_head(folder):
    cfg = config(folder)
    given = checkpoint(cfg)
    given["state_dict"] = {k: v for k, v in given["state_dict"].items() if "auxiliary" not in k}
    result, _ = recalibrate(cfg, given, "it", num_images=2, one_pass=True)
    assert result["state_dict"].keys() == given["state_dict"].keys()
    assert result["meta"]["calibrated"] == "2 of 5 training images, in one pass"


def test_mistakes_say_what_to_do(folder):
    cfg = config(folder)
    given = checkpoint(cfg)
    for options, message in (
        (dict(num_images=0), "--num-images must be 1 or more, got 0"),
        (dict(batch_size=0), "--batch-size must be 1 or more, got 0"),
    ):
        with pytest.raises(UsageError, match=message):
            recalibrate(cfg, given, "it", **options)
    with pytest.raises(UsageError, match="of another norm than the config"):
        recalibrate(config(folder, "bcn"), given, "it")
    with pytest.raises(UsageError, match="nothing to calibrate"):
        recalibrate(config(folder, "gn"), checkpoint(config(folder, "gn")), "it")
    cfg.pop("test_dataloader")
    with pytest.raises(UsageError, match="no pipeline in test_dataloader or val_dataloader"):
        recalibrate(cfg, given, "it")


def test_tools(tool, save, folder):
    cfg = config(folder, "bcn")
    cfg.dump(folder / "config.py")
    given = checkpoint(cfg)
    file = save(given, "iter_7.pth")
    code, out = tool("recalibrate", folder / "config.py", file, "--num-images", 3)
    assert code == 0, out
    assert "backbone.bn1" in out
    assert "calibrated on 3 of 5 training images" in out
    assert f"wrote {folder / 'iter_7_recalibrated.pth'}" in out
    expected, _ = recalibrate(cfg, given, "it", 3)
    written = torch.load(folder / "iter_7_recalibrated.pth", weights_only=True)
    for key, value in expected["state_dict"].items():
        assert torch.equal(written["state_dict"][key], value)

    other = copy.deepcopy(given)
    for key, value in other["state_dict"].items():
        if not is_statistic(key):
            value.mul_(3)
    args = ["--config", folder / "config.py", "--num-images", 3, "--out", folder / "avg.pth"]
    code, out = tool("average", file, save(other, "iter_9.pth"), *args)
    assert code == 0, out
    assert "warning" not in out
    written = torch.load(folder / "avg.pth", weights_only=True)["state_dict"]
    weight = given["state_dict"]["backbone.conv1.weight"]
    torch.testing.assert_close(written["backbone.conv1.weight"], 2 * weight)
    stage = "backbone.bn1.bn.running_var"  # of twice the weights: four times the variance
    torch.testing.assert_close(written[stage], 4 * expected["state_dict"][stage])

    code, out = tool("recalibrate", folder / "config.py", file, "--out", file)  # onto itself
    assert code == 0
    assert torch.load(file, weights_only=True)["meta"]["calibrated"]
