"""Every shipped config reads, builds, and takes a training step on tiny inputs."""

import ast
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmbcn import set_norm

ROOT = Path(__file__).parents[1] / "configs"
# those of other codebases: tests/test_models/test_other_codebases.py
CONFIGS = sorted([*ROOT.glob("*.py"), *ROOT.glob("deeplabv3/*.py")])
NAME = re.compile(
    r"(?P<model>\w+?)_r(?P<depth>\d+)(?P<os>-os16)?_(?P<norm>[a-z]+(?:_ws)?)"
    r"(?:_(?P<apr>apr[sp]))?_(?P<sched>\w+)_"
    r"(?P<data>[a-z0-9]+)-(?P<crop>\d+x\d+)"
)
CLASSES = dict(cityscapes=19, voc12=21, voc12aug=21, camvid=11, shapes=7)
DATASETS = dict(
    cityscapes="CityscapesDataset",
    voc12="PascalVOCDataset",
    voc12aug="ConcatDataset",
    camvid="mmbcn.CamVidDataset",
    shapes="mmbcn.ShapesDataset",
)
NORMS = dict(bn="BN", bcn="mmbcn.BCN", syncbcn="mmbcn.SyncBCN", ic="mmbcn.IC", enorm="mmbcn.NoNorm")


def train_step(cfg: Config, batch: int, size: int = 64) -> None:
    init_default_scope("mmseg")
    torch.manual_seed(0)
    model_cfg = cfg.model.copy()
    model_cfg.data_preprocessor.size = (size, size)
    model = MODELS.build(model_cfg)
    model.init_weights()
    model.train()
    samples = []
    for _ in range(batch):
        sample = SegDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size)))
        label = torch.randint(0, cfg.model.decode_head.num_classes, (1, size, size))
        sample.gt_sem_seg = PixelData(data=label)
        samples.append(sample)
    data = dict(
        inputs=[torch.randint(0, 256, (3, size, size), dtype=torch.uint8) for _ in range(batch)],
        data_samples=samples,
    )
    data = model.data_preprocessor(data, training=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        out = model(data["inputs"][:1], mode="tensor")
    assert out.shape[1] == cfg.model.decode_head.num_classes
    assert out.isfinite().all()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_what_its_name_says(path):
    cfg = Config.fromfile(str(path))
    if path.parent == ROOT:
        assert path.stem == "deeplabv3_r101_bcn"
        return
    name = NAME.fullmatch(path.stem)
    assert name, path.stem
    crop = tuple(map(int, name["crop"].split("x")))
    assert cfg.model.backbone.depth == int(name["depth"])
    assert cfg.model.backbone.norm_cfg.type == NORMS[name["norm"].removesuffix("_ws")]
    assert cfg.model.decode_head.norm_cfg == cfg.model.backbone.norm_cfg
    parts = [cfg.model.backbone, cfg.model.decode_head, cfg.model.get("auxiliary_head")]
    in_ic_order = {part.type.startswith("mmbcn.IC") for part in parts if part}
    assert in_ic_order == {name["norm"] == "ic"}
    assert ("mmbcn.ENormHook" in [h.type for h in cfg.custom_hooks]) == (name["norm"] == "enorm")
    assert ("conv_cfg" in cfg.model.backbone) == name["norm"].endswith("_ws")
    assert cfg.model.decode_head.num_classes == CLASSES[name["data"]]
    assert tuple(cfg.model.data_preprocessor.size) == crop
    dataset = cfg.train_dataloader.dataset
    assert dataset.type == DATASETS[name["data"]]
    pipeline = dataset.get("pipeline") or dataset.datasets[0].pipeline
    crops = [tuple(t.crop_size) for t in pipeline if t.type == "RandomCrop"]
    assert crops in ([crop], [] if name["data"] == "shapes" else None)
    aprs = [i for i, t in enumerate(pipeline) if t.type == "mmbcn.APRSingle"]
    assert aprs == ([len(pipeline) - 2] if name["apr"] == "aprs" else [])
    is_pair = cfg.model.data_preprocessor.type == "mmbcn.APRPairDataPreProcessor"
    assert is_pair == (name["apr"] == "aprp")
    if name["sched"].endswith("e"):
        assert cfg.train_cfg.max_epochs == int(name["sched"][:-1])
    else:
        iters = int(name["sched"].replace("k", "000"))
        assert cfg.train_cfg.max_iters == iters
        assert cfg.param_scheduler[-1].end == iters


@pytest.mark.parametrize("norm", ["bcn", "ic"])
def test_norm_is_one_line(norm):
    """A config and its BatchNorm twin differ by one line beside `_base_` and the import."""
    for path in ROOT.glob(f"deeplabv3/*_{norm}_[0-9]*.py"):
        text = path.read_text().replace('"', "'")
        lines = [line for line in text.splitlines() if line]
        assert len(lines) == 3
        twin = path.name.replace(f"_{norm}_", "_bn_")
        assert lines[0] == f"_base_ = './{twin}'"
        assert lines[2] == f"model = set_norm(_base_.model, '{norm}')"


def test_apr_is_one_statement():
    """A config with APR and its twin without differ by one statement beside `_base_`."""
    paths = list(ROOT.glob("deeplabv3/*_apr[sp]_*.py"))
    assert paths
    for path in paths:
        base, change = ast.parse(path.read_text()).body
        twin = re.sub("_apr[sp]", "", path.name)
        assert ast.unparse(base) == f"_base_ = './{twin}'"
        assert ("APRSingle" in ast.unparse(change)) == ("_aprs_" in path.stem)


@pytest.mark.parametrize(
    "path",
    [p for p in CONFIGS if re.search("_r18_(bcn|ic|enorm)_[0-9]|os16", p.stem)],
    ids=lambda p: p.stem,
)
def test_config_trains_a_step(path):
    train_step(Config.fromfile(str(path)), batch=2, size=32 if "os16" in path.stem else 64)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_trains_a_step(path):
    train_step(Config.fromfile(str(path)), batch=2, size=32)


@pytest.mark.parametrize("name", ["bcn", "bcn_ws", "microbcn", "microbcn_ws", "gn", "gn_ws"])
def test_family_trains_at_batch_size_one(name):
    cfg = Config.fromfile(str(ROOT / "deeplabv3/deeplabv3_r18_bn_300_shapes-128x128.py"))
    set_norm(cfg.model, name)
    train_step(cfg, batch=1)
