"""Comparisons that are made up: results without training, and tools that only pretend."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from mmengine.config import Config
from PIL import Image

from mmbcn.analysis.comparison.folder import Place, prepare
from mmbcn.analysis.comparison.plan import Rules, Run, make_plan
from mmbcn.analysis.comparison.result import write_result

ROOT = Path(__file__).parents[2]
CONFIG = "configs/deeplabv3/deeplabv3_r18_bcn_300_shapes-128x128.py"
PALETTE = [[200, 30, 30], [30, 120, 200]]

# trains as tools/train.py does, as far as a comparison can see; "hang" waits to be ended
TRAIN = """
import json, os, pathlib, runpy, signal, sys, time
cfg, work = runpy.run_path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--work-dir") + 1])
iters, norm = cfg["train_cfg"]["max_iters"], cfg["model"]["backbone"]["norm_cfg"]["type"]
told = json.loads(pathlib.Path(__file__).with_name("told.json").read_text()).get(norm, "")
start = int((work / "saved").read_text()) if (work / "saved").is_file() else 0
print(f"threads {os.environ['OMP_NUM_THREADS']} resumed at {start} {'--resume' in sys.argv}")
log = work / str(len(list(work.glob("*/vis_data")))) / "vis_data/scalars.json"
log.parent.mkdir(parents=True)
with log.open("w") as file:
    for step in range(start + 1, iters + 1):
        loss = float("nan") if told == "nan" else 1 / step
        point = dict(loss=loss, lr=0.1, time=0.5 + 0.01 * step, data_time=0.25, iter=step)
        print(json.dumps(point | dict(step=step)), file=file, flush=True)
        (work / "saved").write_text(str(step))
        if told == "hang" and step == start + 3:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            while True:
                time.sleep(0.1)
        if told == "killed" and step == start + 3:
            os.kill(os.getpid(), signal.SIGKILL)
if told == "error":
    sys.exit("error: of the user\\nwho reads on")
if told == "crash":
    raise RuntimeError("struck")
(work / f"iter_{iters}.pth").write_text("")
"""
TEST = """
import json, pathlib, sys
assert pathlib.Path(sys.argv[2]).is_file()
record = pathlib.Path(sys.argv[sys.argv.index("--work-dir") + 1], "record")
record.mkdir(parents=True, exist_ok=True)
counts = dict(classes=["a", "b", "c"], palette=[[1, 2, 3]] * 3, images=2)
counts |= dict(intersection=[1, 6, 0], union=[4, 8, 0], metrics=dict(mIoU=50.0))
(record / "test.json").write_text(json.dumps(counts))
for kind in ("image.jpg", "truth.png", "prediction.png"):
    (record / f"0001_x_y_{kind}").write_text(kind)
"""


def shapes_config() -> Config:
    """The config of the embedded set that the made-up comparisons are of."""
    return Config.fromfile(ROOT / CONFIG)


def quick_configs() -> Any:
    """Leaves configs as they come: formatting each takes longer than all the rest."""
    return patch("yapf.yapflib.yapf_api.FormatCode", lambda text, **_: (text, False))


def made_up(out: Path, norms: str, seeds: int, batch_sizes: tuple[int, ...] = (1, 2)) -> list[Run]:
    """A finished comparison with pictures; BatchNorm fails at batch size 1."""
    rules = Rules(norms.split(","), batch_sizes, seeds, iters=40)
    cfg = shapes_config()
    runs = make_plan(cfg, rules)
    with quick_configs():
        prepare(cfg, CONFIG, rules, runs, out, "python tools/analysis/compare_norms.py CONFIG")
    labels = np.zeros((24, 32), np.uint8)
    labels[6:18, 8:24] = 1
    (out / "images").mkdir()
    Image.new("RGB", (32, 24), (90, 160, 90)).save(out / "images/0001_x_image.jpg")
    _save(labels, out / "images/0001_x_truth.png")
    for number, run in enumerate(runs):
        place = Place(out, run)
        if run.norm == "bn" and run.batch_size == 1:
            result = dict(status="failed", reason="more than 1 value\nper channel <b>", curve={})
            result |= dict(singularity={})
        else:
            result = finished(run, 20 + number)
            place.folder.joinpath("predictions").mkdir()
            _save(np.roll(labels, number, 1), place.folder / "predictions/0001_x.png")
        facts = dict(device="abacus", threads=1, commit="c0ffee")
        write_result(dict(result, run=asdict(run), environment=facts), place.result)
    return runs


def finished(run: Run, miou: float) -> dict:
    """The result of a run that came to its end."""
    steps = list(range(1, run.iters + 1))
    loss = [math.exp(-step / 20) for step in steps]
    measures = {key: [0.1, 0.2] for key in ("sigma_mu", "sigma_sigma", "dead", "kl")}
    return dict(
        run=asdict(run),
        status="done",
        reason="",
        miou=miou,
        class_iou=dict(a=miou - 1, b=miou + 1, c=None),
        metrics=dict(mIoU=miou, mAcc=50.0),
        images_tested=2,
        palette=PALETTE,
        curve=dict(iter=steps, loss=loss, lr=[0.1] * run.iters),
        singularity=dict(iter=[20, 40], **measures, layers={}),
        step_seconds=0.1,
        data_seconds=0.01,
        process_bytes=2**30,
        cuda_bytes=None,
        test_seconds=3.0,
    )


def _save(labels: np.ndarray, path: Path) -> None:
    image = Image.fromarray(labels)
    image.putpalette([value for color in PALETTE for value in color])
    image.save(path)


def pretend(folder: Path, **told: str) -> Path:
    """A folder of tools that pretend; ``told`` says by a norm's type what its training does."""
    folder.mkdir(exist_ok=True)
    (folder / "train.py").write_text(TRAIN)
    (folder / "test.py").write_text(TEST)
    (folder / "told.json").write_text(json.dumps(told))
    return folder
