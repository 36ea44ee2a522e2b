"""Write a trained model as one file that other programs run without its config, or mmseg, or torch.

The file takes pictures as OpenCV reads them, uint8 (N, H, W, 3) with channels blue, green, red; the
normalization is inside. It gives labels (N, H, W), the class of every pixel, and logits
(N, C, H, W). Classes, colours and more are in its metadata. docs/deploy.md has an example.

Examples:
    python tools/deploy/export.py CONFIG work_dirs/NAME/iter_300.pth --fold --dynamic --verify
    python tools/deploy/export.py CONFIG CHECKPOINT --fold --verify --int8 --evaluate --benchmark
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _common import add_config_args, add_trust_arg, make_parser, progress_bar, read_config, run
from mmengine.config import Config
from torch import nn

from mmbcn.analysis.segmentor import load_segmentor
from mmbcn.analysis.timing import Timing, markdown_table, time_interleaved
from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.deploy.evaluate import FileModel, validation_set
from mmbcn.deploy.export import OPSET, VERIFIED, Export, export, export_int8, random_pictures
from mmbcn.deploy.formats import FORMATS
from mmbcn.deploy.segmenter import Segmenter


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config_args(parser)
    parser.add_argument("checkpoint", help="checkpoint file or URL")
    parser.add_argument("--format", choices=list(FORMATS), default="onnx", help="%(default)s")
    parser.add_argument("--out", type=Path, help="file to write (default: beside CHECKPOINT)")
    parser.add_argument(
        "--opset",
        type=int,
        default=OPSET,
        help="of ONNX, 18 or later (%(default)s)",
    )
    parser.add_argument(
        "--input-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="of the images (default: as the test pipeline gives the first of the val split)",
    )
    parser.add_argument(
        "--dynamic", action="store_true", help="any number of images, of any size from 32 pixels on"
    )
    parser.add_argument(
        "--fold", action="store_true", help="fold norms into convolutions (mmbcn.deploy.fold)"
    )
    parser.add_argument("--fp16", action="store_true", help="weights and arithmetic in float16")
    parser.add_argument(
        "--verify",
        action="store_true",
        help=f"compare with PyTorch on {VERIFIED} val images; a file that differs is not kept",
    )
    parser.add_argument(
        "--int8", action="store_true", help="also write an ONNX file with 8-bit convolutions"
    )
    parser.add_argument(
        "--calibration-images",
        type=int,
        default=64,
        metavar="N",
        help="training images that --int8 takes its ranges from (%(default)s)",
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="the mIoU on the val split of PyTorch and each file"
    )
    parser.add_argument("--benchmark", action="store_true", help="latency of PyTorch and each file")
    add_trust_arg(parser)
    args = parser.parse_args()
    if args.int8 and (args.format != "onnx" or args.fp16):
        parser.error("--int8 is for --format onnx without --fp16")
    if args.opset < 18:
        parser.error(f"--opset must be 18 or later, got {args.opset}")
    if args.calibration_images < 1:
        parser.error(f"--calibration-images must be 1 or more, got {args.calibration_images}")
    return args


def measure_miou(cfg: Config, model: nn.Module, files: dict[str, Export]) -> None:
    """Print the mIoU of PyTorch and of each file."""
    images = validation_set(cfg)
    models = {"PyTorch": model}
    models |= {name: FileModel(model, file.run, file.size) for name, file in files.items()}
    rows = []
    for name, one in models.items():
        with progress_bar(name, "images") as update:
            rows.append({"val split": name, "mIoU, %": images.miou(one, update)})
    print(f"{images.total} images\n{markdown_table(rows)}")


def measure_latency(model: nn.Module, files: dict[str, Export]) -> None:
    """Print the latency of one picture, PyTorch and each file in turn."""
    size = next(iter(files.values())).size
    pictures = random_pictures(size)
    tensor = torch.from_numpy(pictures)
    cases = {}
    for name, folded in (("PyTorch", False), ("PyTorch, folded", True)):
        segmenter = Segmenter(model, folded)
        cases[name] = lambda segmenter=segmenter: segmenter(tensor)
    for name, file in files.items():
        cases[name] = lambda file=file: file.run(pictures)
    with torch.no_grad():
        times = {k: Timing.of(v) for k, v in time_interleaved(cases, 20.0).items()}
    base = times["PyTorch"].p50
    rows = [
        {"one picture": name, "median, ms": t.p50, "/ PyTorch": t.p50 / base}
        for name, t in times.items()
    ]
    print(f"{size[0]}x{size[1]}, {torch.get_num_threads()} threads\n{markdown_table(rows)}")


def main() -> None:
    """Export, verify, measure."""
    args = parse_args()
    cfg, source = read_config(args), fetch(args.checkpoint)
    checkpoint = read_checkpoint(source, trust_pickle=args.trust_pickle)
    model, _ = load_segmentor(cfg, checkpoint, args.checkpoint, "cpu")
    out = args.out or source.with_suffix(FORMATS[args.format].suffix)
    options = args.input_size, args.dynamic, args.fold, args.fp16, args.opset, args.verify
    file = export(cfg, checkpoint, model, out, args.format, *options)
    if file.folded:
        print(file.folded.summary())
    if file.verified:
        print(file.verified.text())
    opset = f", opset {args.opset}" if args.format == "onnx" else ""
    print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB{opset}")
    files = {f"{args.format}{', float16' if args.fp16 else ''}": file}
    if args.int8:
        out = out.with_stem(f"{out.stem}_int8")
        files["onnx, int8"] = export_int8(cfg, file, out, args.calibration_images)
        print(f"wrote {out}: {out.stat().st_size / 1e6:.1f} MB")
    if args.evaluate:
        measure_miou(cfg, model, files)
    if args.benchmark:
        measure_latency(model, files)


if __name__ == "__main__":
    run(main)
