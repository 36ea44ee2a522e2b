"""The analysis tools, run as a user runs them, on a tiny embedded set."""

import copy
import csv
import json

import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("pandas")

from mmengine.registry import MODELS, init_default_scope
from test_tools import CONFIG, ROOT, run

from mmbcn import set_norm
from mmbcn.analysis import measure_singularity
from mmbcn.analysis.images import SplitImages
from mmbcn.analysis.segmentor import load_segmentor, run_heads

OPTIONS = [
    "model.backbone.base_channels=8",
    "model.backbone.stem_channels=8",
    "model.decode_head.in_channels=64",
    "model.decode_head.channels=16",
    "model.auxiliary_head.in_channels=32",
    "model.auxiliary_head.channels=16",
    "train_dataloader.num_workers=0",
    "train_dataloader.persistent_workers=False",
    "train_dataloader.dataset.num_images=8",
    "train_dataloader.dataset.size=(48,48)",
    "val_dataloader.dataset.size=(48,48)",
]
RELUS, SUMS = 18, 11  # norms of a ResNet-18 DeepLabV3 with V1c stem: followed by a ReLU, or not


def save(cfg, path, iteration, seed):
    init_default_scope("mmseg")
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    meta = dict(iter=iteration, cfg=cfg.pretty_text)
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)
    return path


@pytest.fixture(scope="module")
def cfg():
    from mmengine.config import Config, DictAction

    cfg = Config.fromfile(ROOT / CONFIG)
    pairs = (option.split("=") for option in OPTIONS)
    cfg.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in pairs})
    return cfg


def direct(cfg, path, **options):
    """The same without the tool: the layers' rows."""
    model, _ = load_segmentor(cfg, torch.load(path), "")
    images = SplitImages(cfg, **dict(dict(num_images=3, batch_size=2), **options))
    return measure_singularity(model, images, run_heads).table()


def test_checkpoints_of_a_run(tmp_path, cfg):
    paths = [save(cfg, tmp_path / f"iter_{i}.pth", i, seed=i) for i in (20, 3)]
    out = tmp_path / "es"
    code, text = run(
        "tools/analysis/singularity.py",
        *(CONFIG, *paths, "--out", out, "--num-images", 3, "--cfg-options", *OPTIONS),
    )
    assert code == 0, text
    assert f"iter_20: a ReLU follows {RELUS} norms\n  followed by add: backbone.layer1" in text
    names = ["channels.csv", "channels_iter_20.png", "channels_iter_3.png", "curves.png"]
    names += ["depth.png", "layers.csv", "singularity.json", "spreads.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    rows = list(csv.DictReader((out / "layers.csv").open()))
    models = json.loads((out / "singularity.json").read_text())["models"]
    assert [(m["source"], m["iteration"]) for m in models] == [
        (str(path), i) for path, i in zip(paths, (20, 3), strict=True)
    ]
    assert {len(m["others"]) for m in models} == {SUMS}
    for i, path in enumerate(paths):
        expected = direct(cfg, path)
        own = rows[i * RELUS : (i + 1) * RELUS]
        assert [row["layer"] for row in own] == list(expected["layer"])
        for key in ("sigma_mu", "sigma_sigma", "dead", "kl"):
            values = [float(row[key]) for row in own]
            assert values == pytest.approx(list(expected[key]), rel=1e-4, abs=1e-5)
            assert values == [v[key] for v in models[i]["layers"]]


@pytest.mark.slow
def test_other_norms_and_mistakes(tmp_path, cfg):
    path = save(cfg, tmp_path / "bcn.pth", 1, seed=0)
    gn = copy.deepcopy(cfg)
    set_norm(gn.model, "gn")
    other = save(gn, tmp_path / "gn.pth", 1, seed=0)
    tool = ("tools/analysis/singularity.py", CONFIG)
    options = ("--num-images", 2, "--split", "val", "--cfg-options", *OPTIONS)
    code, text = run(*tool, path, "--out", tmp_path / "a", *options)
    assert code == 0, text
    assert not (tmp_path / "a/curves.png").exists()
    earlier = tmp_path / "a/singularity.json"
    code, text = run(*tool, other, earlier, "--norm", "gn", "--out", tmp_path / "b", *options)
    assert code == 0, text
    rows = list(csv.DictReader((tmp_path / "b/layers.csv").open()))
    assert [(row["model"], row["norm"]) for row in rows] == [
        *[("gn", "AutoGroupNorm")] * RELUS,
        *[("bcn", "BCN")] * RELUS,
    ]
    expected = direct(cfg, path, split="val", num_images=2)["sigma_mu"]
    values = [float(row["sigma_mu"]) for row in rows[RELUS:]]
    assert values == pytest.approx(list(expected), rel=1e-4)

    for args, message in [
        ([other], "error: the checkpoint is of another norm than the config"),
        ([tmp_path / "none.pth"], "error: there is no checkpoint"),
        ([tmp_path / "none.json"], "is no singularity.json that can be read (No such file"),
        ([earlier, earlier], "is given twice"),
        ([tmp_path], "has no scalars of SingularityHook"),
        ([path, "--num-images", 0], "error: --num-images must be 1 or more"),
        ([path, "--device", "cuda:99"], "error: --device cuda:99: "),
    ]:
        code, text = run(*tool, *args, "--out", tmp_path / "c", "--cfg-options", *OPTIONS)
        assert code == 1
        assert message in text
        assert "Traceback" not in text
        assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_paper_figures(tmp_path):
    code, text = run(
        *("tools/analysis/paper_figures.py", "--out", tmp_path, "--seeds", 1, "--epochs", 1),
        *("--patches", 200, "--size", 16, "--width", 4),
    )
    assert code == 0, text
    names = ["paper_figures.json", "perturbed.png", "trained.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    result = json.loads((tmp_path / names[0]).read_text())
    assert (len(result["perturbed"]), len(result["trained"])) == (18, 6)
    assert result["command"].startswith("python tools/analysis/paper_figures.py --out ")
