"""Convert a foreign checkpoint into one of a config's model, and say what became of its entries.

Takes ResNets of torchvision, timm and OpenMMLab with BatchNorm or GroupNorm, the BCN authors'
backbones and their DeepLabV3. train.py and test.py load all of them directly, too.

Example:
    python tools/checkpoints/convert.py rn101_bcn_ws.pth rn101.pth \
        --config configs/deeplabv3/deeplabv3_r101-os16_syncbcn_ws_50e_voc12aug-513x513.py
"""

import sys
from pathlib import Path

sys.path.pop(0)  # else inspect.py, beside this file, hides Python's own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from typing import Any

from _common import add_config_args, add_load_args, make_parser, read_config, run
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope

import mmbcn
from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.fit import fit_checkpoint
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.checkpoints.write import write_checkpoint
from mmbcn.errors import UsageError


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("src", help="checkpoint: file, URL, torchvision://NAME, open-mmlab://NAME")
    parser.add_argument("dst", type=Path, help="file to write: .pth, or .safetensors")
    add_config_args(parser, name="--config")
    add_load_args(parser)
    return parser.parse_args()


def main() -> None:
    """Read, fit, report, write."""
    args = parse_args()
    cfg = read_config(args)
    path = fetch(args.src)
    if path.exists() and args.dst.exists() and path.samefile(args.dst):
        raise UsageError(f"{args.dst} is the checkpoint itself: give another file to write")
    checkpoint = read_checkpoint(path, trust_pickle=args.trust_pickle)
    init_default_scope(cfg.get("default_scope") or "mmseg")
    state, report = fit_checkpoint(
        MODELS.build(cfg.model), checkpoint, args.src, allow_partial=args.allow_partial
    )
    print(report.text())
    meta = checkpoint.get("meta")
    known = meta if isinstance(meta, dict) else {}
    meta = dict(
        cfg=cfg.pretty_text,
        dataset_meta=known.get("dataset_meta") or dataset_meta(cfg),
        converted_from=path.name,
        mmbcn_version=mmbcn.__version__,
    )
    write_checkpoint({"meta": meta, "state_dict": state}, args.dst)
    print(f"wrote {args.dst}")


def dataset_meta(cfg: Config) -> dict[str, Any]:
    """Classes and palette of the config's test set: ``init_model`` wants them in a checkpoint."""
    dataset = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    while "dataset" in dataset:
        dataset = dataset["dataset"]
    if "type" not in dataset:
        return {}
    with DATASETS.switch_scope_and_registry(None) as registry:
        known = getattr(registry.get(dataset["type"]), "METAINFO", {})
    return {**known, **dataset.get("metainfo", {})}


if __name__ == "__main__":
    run(main)
