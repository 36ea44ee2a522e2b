"""What the tests of the dataset doctor share: a config, its diagnosis, and planted faults."""

import shutil
from pathlib import Path

import numpy as np
from mmengine.config import ConfigDict
from PIL import Image

from mmbcn.datasets import CamVidDataset
from mmbcn.datasets.doctor import examine, open_parts

PIPELINE = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
MODEL = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True
    ),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)


def dataset(root, split, **settings):
    prefix = dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}")
    settings = {"data_prefix": prefix, "pipeline": PIPELINE, **settings}
    return dict(type="mmbcn.CamVidDataset", data_root=str(root), **settings)


def config(root, model=MODEL, splits=("train", "val"), **settings):
    loaders = {f"{s}_dataloader": dict(dataset=dataset(root, s, **settings)) for s in splits}
    return ConfigDict(model=model, **loaders)


def diagnose(cfg, *splits):
    return examine(open_parts(cfg, splits or ("train", "val")), 1)


def found(diagnoses):
    """(kind, file name) of all findings."""
    findings = [finding for diagnosis in diagnoses for finding in diagnosis.findings]
    return [(finding.kind, Path(finding.path).name) for finding in findings]


def text_of(diagnoses, kind):
    (text,) = (str(f) for d in diagnoses for f in d.findings if f.kind == kind)
    return text


def set_labels(root, value):
    for path in (root / "annotations").rglob("*.png"):
        label = value(np.asarray(Image.open(path)))
        Image.fromarray(label.astype(np.uint8)).save(path)


def plant_faults(root):
    """Break one training sample after the other; the findings (kind, file name) to expect."""
    images = sorted((root / "images/train").iterdir())
    labels = [root / f"annotations/train/{image.stem}.png" for image in images]
    expected = set()

    def expect(kind, path):
        expected.add((kind, path.name))
        return path

    def change(path, function):
        Image.fromarray(function(np.asarray(Image.open(path)))).save(path)

    expect("missing label", labels[0]).unlink()
    images[1].unlink()
    expect("label without image", labels[1])
    data = images[2].read_bytes()
    expect("unreadable image", images[2]).write_bytes(data[: len(data) // 2])
    data = labels[3].read_bytes()
    expect("unreadable label", labels[3]).write_bytes(data[: len(data) // 2])
    expect("unreadable image", images[4]).write_bytes(b"")
    expect("unreadable image", images[5]).write_text("404 not found")
    change(expect("image and label differ in size", labels[6]), lambda x: x[:-1])
    change(expect("label has more than 8 bits", labels[7]), lambda x: x + np.uint16(24000))
    palette = np.zeros((256, 3), np.uint8)
    palette[:11] = CamVidDataset.METAINFO["palette"]
    change(expect("label is not one channel", labels[8]), lambda x: palette[x])
    change(
        expect("label values outside the classes", labels[9]),
        lambda x: np.where(x < 11, x + 7, 0).astype(np.uint8),
    )
    change(
        expect("label values outside the classes", labels[10]),
        lambda x: np.where(x > 2, 11, x).astype(np.uint8),  # void of SegNet's release
    )
    change(expect("suspicious label", labels[11]), lambda x: 255 * (x > 3).astype(np.uint8))
    change(expect("label stored as 16 bits or more", labels[12]), lambda x: x.astype(np.uint16))
    val = min((root / "images/val").iterdir())
    shutil.copyfile(val, expect("same image in two splits", images[13]))
    shutil.copyfile(images[15], expect("same image twice", images[16]))
    Image.open(labels[17]).save(expect("label stored with loss", labels[17]), "JPEG", quality=100)
    change(expect("suspicious label", labels[18]), lambda x: np.full_like(x, 255))
    change(expect("uniform image", images[19]), lambda x: np.zeros_like(x))
    return expected
