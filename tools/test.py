"""Test a checkpoint: the mIoU table, and pictures of predictions beside the truth.

Example:
    python tools/test.py CONFIG CHECKPOINT --show-dir work_dirs/pictures
"""

import argparse

from _common import add_config_args, add_load_args, add_run_args, read_run_config, run
from mmengine.registry import RUNNERS

from mmbcn.engine.config_check import check_keys
from mmbcn.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_config_args(parser)
    parser.add_argument("checkpoint", help="checkpoint file or URL")
    add_run_args(parser)
    add_load_args(parser)
    parser.add_argument("--out", help="folder for the predicted label maps, as PNG")
    parser.add_argument("--show-dir", help="folder for pictures: image, truth, prediction")
    parser.add_argument("--show-num", type=int, help="only this many, evenly spread (default: all)")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation")
    return parser.parse_args()


def main() -> None:
    """Test."""
    args = parse_args()
    cfg = read_run_config(args)
    check_keys(cfg, "test")
    cfg.load_from = args.checkpoint
    if args.show_dir:
        panels = dict(type="mmbcn.PanelHook", out_dir=args.show_dir, limit=args.show_num)
        cfg.custom_hooks = [*cfg.get("custom_hooks", []), panels]
    if args.out:
        cfg.test_evaluator["output_dir"] = args.out
        cfg.test_evaluator["keep_results"] = True
    if args.tta:
        if "tta_pipeline" not in cfg or "tta_model" not in cfg:
            raise UsageError("--tta needs tta_pipeline and tta_model in the config")
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    RUNNERS.build(cfg).test()


if __name__ == "__main__":
    run(main)
