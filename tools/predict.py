"""Predict on images and videos: pictures with the classes' colours, and more.

Writes in the folder --out: overlays/, for each image a PNG and for each video an MP4; with --labels
labels/, PNGs with the class index of each pixel, of a video one for each frame; with
--probabilities probabilities/, .npz files with the float16 array 'probabilities' (classes, height,
width); and legend.png, the classes' colours. All at the inputs' own size. What is there already is
not made again. Files that cannot be read are named and passed over; the exit code then is 1.

Example:
    python tools/predict.py CONFIG CHECKPOINT photos/ 'more/*.jpg' ride.mp4 --out work_dirs/seen
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
from _common import (
    add_config_args,
    add_trust_arg,
    check_device,
    make_parser,
    progress_bar,
    read_config,
    run,
)
from mmengine.config import Config
from mmengine.device import get_device
from numpy.typing import NDArray

from mmbcn.analysis.kept_results import digest, fingerprint
from mmbcn.analysis.segmentor import load_segmentor
from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.read import check_file, read_checkpoint
from mmbcn.checkpoints.write import whole_file
from mmbcn.engine.config_check import check_keys
from mmbcn.engine.mistakes import explained
from mmbcn.errors import UsageError
from mmbcn.inference.predictor import Image, Predictor, UnreadableError
from mmbcn.inference.results import Results, blend, draw_legend, find_classes
from mmbcn.inference.sources import find_sources
from mmbcn.inference.video import VideoReader, VideoWriter, count_frames, expected_frames

Draw = Callable[[Image, NDArray[np.int64]], NDArray[np.uint8]]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config_args(parser)
    add = parser.add_argument
    add("checkpoint", help="checkpoint file or URL")
    add("inputs", nargs="+", metavar="input", help="image, video, folder, or quoted pattern")
    add("--out", type=Path, help="folder of results (default: work_dirs/<config stem>_predictions)")
    add("--labels", action="store_true", help="write the class of each pixel as PNG")
    add("--probabilities", action="store_true", help="write the classes' probabilities as .npz")
    add("--opacity", type=float, default=0.5, help="of the colours, 0 to 1 (%(default)s)")
    add("--mode", choices=["whole", "slide"], help="predict at once or in windows (config's)")
    size = dict(nargs=2, type=int, metavar=("H", "W"))
    add("--crop-size", **size, help="of windows, in pixels (config's)")
    add("--stride", **size, help="of windows, in pixels (config's, else two thirds of the window)")
    add("--tta", action="store_true", help="average over the views of the config's tta_pipeline")
    add("--batch-size", type=int, default=1, help="images at once (%(default)s)")
    add("--device", help="as torch calls it, cpu or cuda:1 (default: a GPU where there is one)")
    add("--overwrite", action="store_true", help="make everything anew")
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Predict."""
    args = parse_args()
    if not 0 <= args.opacity <= 1:
        raise UsageError(f"--opacity must be from 0 to 1, got {args.opacity}")
    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be 1 or more, got {args.batch_size}")
    cfg = read_config(args)
    check_keys(cfg)
    set_mode(cfg, args)
    out = args.out or Path(f"work_dirs/{Path(args.config).stem}_predictions")
    sources = find_sources(args.inputs, out)
    device = check_device(args.device or get_device())
    path = check_file(fetch(args.checkpoint))
    checkpoint = read_checkpoint(path, trust_pickle=args.trust_pickle)
    with explained():
        model, _ = load_segmentor(cfg, checkpoint, args.checkpoint, device)
        predictor = Predictor(cfg, model, args.tta)
    kinds = ["overlays"]
    kinds += [kind for kind in ("labels", "probabilities") if getattr(args, kind)]
    settings = fingerprint(path, cfg, "val_dataloader")
    settings |= dict(tta=args.tta, opacity=args.opacity)
    if args.tta:
        settings |= dict(tta_pipeline=digest(cfg.tta_pipeline))
    results = Results(out, settings, sources, kinds, args.overwrite)
    names, colors = find_classes(cfg, checkpoint, model.out_channels)
    with whole_file(out / "legend.png", "legend") as part:
        part.write_bytes(cv2.imencode(".png", draw_legend(names, colors))[1].tobytes())

    def draw(image: Image, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        return blend(image.pixels, labels, colors, args.opacity)

    report(predict(predictor, results, draw, args.batch_size), results)


def set_mode(cfg: Config, args: argparse.Namespace) -> None:
    """Let the model predict at once or in windows, as the command line says."""
    old = cfg.model.get("test_cfg") or {}
    mode = args.mode or ("slide" if args.crop_size or args.stride else old.get("mode", "whole"))
    if mode == "whole":
        if args.crop_size or args.stride:
            raise UsageError("--crop-size and --stride are of --mode slide")
        cfg.model.test_cfg = dict(old, mode=mode)
        return
    crop = args.crop_size or old.get("crop_size") or cfg.model.data_preprocessor.get("size")
    if not crop:
        raise UsageError("--mode slide needs --crop-size H W: the config has none")
    stride = args.stride or (None if args.crop_size else old.get("stride"))
    stride = stride or [max(2 * size // 3, 1) for size in crop]
    if not all(0 < step <= size for step, size in zip(stride, crop, strict=True)):
        raise UsageError(
            f"--stride must be from 1 to the window's size, so that windows leave no gap; got "
            f"windows of {crop[0]}x{crop[1]} and strides of {stride[0]}x{stride[1]}"
        )
    cfg.model.test_cfg = dict(old, mode=mode, crop_size=tuple(crop), stride=tuple(stride))


def predict(
    predictor: Predictor, results: Results, draw: Draw, batch_size: int
) -> tuple[int, int, dict[str, str]]:
    """Predict what is not there yet; returns numbers of files: done, there before, and faults."""
    todo = [name for name in results.sources if not results.is_done(name)]
    images = [name for name in todo if not results.sources[name].is_video]
    videos = [name for name in todo if results.sources[name].is_video]
    total = len(images) + sum(max(count_frames(results.sources[name].path), 1) for name in videos)
    faults: dict[str, str] = {}
    done = 0

    def fail(name: str, error: UnreadableError) -> None:
        path = str(results.sources[name].path)
        faults[path] = str(error)
        print(f"skipped {path}: {error}", file=sys.stderr)

    def read_images() -> Iterator[tuple[str, Image]]:
        for name in images:
            try:
                yield name, predictor.read(results.sources[name].path)
            except UnreadableError as error:
                fail(name, error)

    with progress_bar("predict", "images and frames") as update:
        update(done, total)
        for batch in batches(read_images(), batch_size):
            for name, image, found in zip(
                *zip(*batch, strict=True), predictor([i for _, i in batch]), strict=True
            ):
                results.write(name, draw(image, found.labels), found)
            done += len(batch)
            update(done + len(faults), total)
        for name in videos:
            try:
                for count in predict_video(predictor, results, draw, name, batch_size):
                    done += count
                    update(done + len(faults), total)
            except UnreadableError as error:
                fail(name, error)
    return len(todo) - len(faults), len(results.sources) - len(todo), faults


def predict_video(
    predictor: Predictor, results: Results, draw: Draw, name: str, batch_size: int
) -> Iterator[int]:
    """Predict on a video; yields numbers of frames."""
    path = results.sources[name].path
    video = VideoReader(path)
    frames, expected = 0, expected_frames(path)
    with results.video(name) as written:
        writer = VideoWriter(written, video.fps)
        try:
            for batch in batches(map(predictor.take, video), batch_size):
                for image, found in zip(batch, predictor(batch), strict=True):
                    picture = draw(image, found.labels)
                    writer.write(picture)
                    results.write(name, picture, found, frames)
                    frames += 1
                yield len(batch)
        finally:
            writer.close()
        if frames < expected:
            raise UnreadableError(f"it ends after {frames} of {expected} frames")


def batches(items: Iterator, size: int) -> Iterator[list]:
    """Lists of ``size`` items, the last perhaps of fewer."""
    while batch := list(islice(items, size)):
        yield batch


def report(outcome: tuple[int, int, dict[str, str]], results: Results) -> None:
    """Say what was done; end with 1 where a file could not be read."""
    done, before, faults = outcome
    there = f", {before} were there already" if before else ""
    print(f"{done} of {len(results.sources)} files predicted{there}: {results.out}")
    if faults:
        listed = "\n".join(f"  {path}: {reason}" for path, reason in faults.items())
        raise UsageError(f"{len(faults)} of {len(results.sources)} files were skipped:\n{listed}")


if __name__ == "__main__":
    run(main)
