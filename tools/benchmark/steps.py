"""Time training steps of whole DeepLabV3 models with different norms, on random images.

The norm ``enorm`` is ``none`` with a cycle of equalization after each step.

Example:
    python tools/benchmark/steps.py --backbones r18 r50 --norms bn bcn --batch 2 --crop 128 256
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _common import ROOT, command, write_csv
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules
from torch import nn

import mmbcn
from mmbcn.analysis.environment import environment
from mmbcn.analysis.equalize import segmentor_equalizer
from mmbcn.analysis.timing import Timing, markdown_table, time_interleaved

OUT = ROOT / "tools/benchmark/results/steps"
HEADING = """# Training steps of DeepLabV3

Batch {batch}, crops of {crop[0]}x{crop[1]}, {dtype}: forward, backward and SGD step, medians of
interleaved rounds, divided by the model with BatchNorm. Peak memory: on GPUs only. Made by
`{command}`.

{where}

"""


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["r50"], choices=["r18", "r50", "r101"])
    parser.add_argument("--norms", nargs="+", default=["bn", "gn", "bcn", "microbcn"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--crop", type=int, nargs=2, default=[512, 1024], metavar=("H", "W"))
    parser.add_argument("--amp", choices=["float16", "bfloat16"], help="under autocast")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each backbone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=OUT, help="result files, without the suffix")
    return parser.parse_args()


def training_step(
    args: argparse.Namespace, backbone: str, norm: str
) -> tuple[Callable[[], None], nn.Module]:
    """One step of a model of its own, and the model."""
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / f"configs/_base_/models/deeplabv3_{backbone}.py")
    name = "none" if norm == "enorm" else norm
    model = MODELS.build(mmbcn.set_norm(cfg.model, name)).to(args.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    if norm == "enorm":
        equalizer = segmentor_equalizer(model, c=1.0)
        optimizer.register_step_post_hook(lambda *_: equalizer.cycle(optimizer))
    images = torch.randn(args.batch, 3, *args.crop, device=args.device)
    samples = []
    for _ in range(args.batch):
        label = torch.randint(0, 19, (1, *args.crop), device=args.device)
        meta = dict(img_shape=tuple(args.crop), pad_shape=tuple(args.crop))
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=label), metainfo=meta))
    dtype = getattr(torch, args.amp or "float32")

    def step() -> None:
        with torch.autocast(args.device, dtype, enabled=args.amp is not None):
            losses = model(images, samples, mode="loss")
        loss = sum(value for key, value in losses.items() if "loss" in key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step, model


def peak_bytes(step: Callable[[], None]) -> int | str:
    """Peak of a step's memory above what was there before, weights and images; on CUDA."""
    if not torch.cuda.is_initialized():
        return ""
    step()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    register_all_modules()
    names = list(dict.fromkeys(["bn", *args.norms]))
    rows, table = [], []
    where = environment(args.device)
    dtype = f"autocast to {args.amp}" if args.amp else "float32"
    for backbone in args.backbones:
        steps = {name: training_step(args, backbone, name)[0] for name in names}
        peaks = {name: peak_bytes(step) for name, step in steps.items()}
        for name, values in time_interleaved(steps, args.seconds, min_rounds=5).items():
            timing = Timing.of(values)
            if name == "bn":
                baseline = timing.p50
            ratio = timing.p50 / baseline
            values = dict(
                norm=name,
                images_per_second=round(1e3 * args.batch / timing.p50, 3),
                **{k: round(v, 3) for k, v in [*timing._asdict().items(), ("ratio", ratio)]},
                peak_bytes=peaks[name],
            )
            crop = f"{args.crop[0]}x{args.crop[1]}"
            setting = dict(backbone=backbone, batch=args.batch, crop=crop, dtype=dtype)
            rows.append({**setting, **values, **where})
            table.append(
                {
                    "backbone": backbone,
                    "norm": name,
                    "step, ms": timing.p50,
                    "images/s": 1e3 * args.batch / timing.p50,
                    "step / BatchNorm's": ratio,
                    "peak memory, MiB": round(peaks[name] / 2**20) if peaks[name] != "" else "",
                }
            )
        del steps
    write_csv(args.out.with_suffix(".csv"), rows)
    facts = ", ".join(f"{key} {value}" for key, value in where.items() if value != "")
    text = HEADING.format(
        batch=args.batch, crop=args.crop, dtype=dtype, command=command(), where=facts
    )
    args.out.with_suffix(".md").write_text(text + markdown_table(table) + "\n")
    print(markdown_table(table))


if __name__ == "__main__":
    main()
