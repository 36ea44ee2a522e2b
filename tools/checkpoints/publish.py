"""Publish a checkpoint: weights and what is needed to use them, under a name with their hash.

Leaves out optimizer, schedulers, message hub and what tells of the training machine; keeps the
config, the classes, iteration and versions. DST.pth becomes DST-0123abcd.pth, after the first
digits of the file's SHA-256. The same checkpoint gives the same file. The config is published as
it is: look whether its paths may be seen.

Example:
    python tools/checkpoints/publish.py work_dirs/NAME/iter_20000.pth published/r50_bcn.pth
"""

import sys
from pathlib import Path

sys.path.pop(0)  # else inspect.py, beside this file, hides Python's own
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse

from _common import add_trust_arg, make_parser, run

from mmbcn.checkpoints.average import holds_ema
from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.inspect import entries
from mmbcn.checkpoints.publish import publish
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.errors import UsageError

SUFFIXES = (".pth", ".pt", ".safetensors")


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("src", help="checkpoint file or URL")
    parser.add_argument("dst", type=Path, help="file to write, or an existing folder")
    parser.add_argument(
        "--format", choices=["pth", "safetensors"], help="(default: by the suffix of DST, else pth)"
    )
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Publish, and say what was left out."""
    args = parse_args()
    source = fetch(args.src)
    path = target(args.dst, source, args.format)
    checkpoint = read_checkpoint(source, trust_pickle=args.trust_pickle)
    published = publish(checkpoint, args.src, path)
    result = read_checkpoint(published)
    broken = [e.key for e in entries(result["state_dict"]) if e.faults]
    if broken:
        print(
            f"warning: faults in {', '.join(broken[:6])}: tools/checkpoints/inspect.py shows them"
        )
    if holds_ema(checkpoint):
        print("note: published are the weights averaged by EMAHook, not the trained ones")
    if "cfg" not in result["meta"]:
        print("note: the checkpoint holds no config: publish it beside the file")
    left_out = [k for k in checkpoint if k not in ("meta", "state_dict")]
    if "state_dict" in checkpoint and left_out:
        print(f"left out: {', '.join(left_out)}")
    before, after = (file.stat().st_size / 2**20 for file in (source, published))
    print(f"wrote {published} ({after:.1f} MiB of {before:.1f} MiB)")


def target(dst: Path, source: Path, kind: str | None) -> Path:
    """The file to write, without the hash."""
    if dst.is_dir():
        dst = dst / source.stem
    if dst.suffix not in SUFFIXES:
        return dst.with_name(f"{dst.name}.{kind or 'pth'}")
    if kind and (dst.suffix == ".safetensors") != (kind == "safetensors"):
        raise UsageError(f"--format {kind} contradicts the suffix of {dst}")
    return dst


if __name__ == "__main__":
    run(main)
