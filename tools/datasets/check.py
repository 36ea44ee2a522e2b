"""Examine the datasets of a config: open every image and label, and say what is wrong.

Ends with 1 where there are errors, with 0 where there are only warnings or none.

Example:
    python tools/datasets/check.py configs/deeplabv3_r101_bcn.py --show-dir work_dirs/doctor
"""

import argparse
import sys
from pathlib import Path

from mmbcn.datasets.doctor import (
    Diagnosis,
    examine,
    format_report,
    open_parts,
    write_fix_lists,
    write_pictures,
)
from mmbcn.datasets.doctor.part import SPLITS
from mmbcn.datasets.parallel import num_cores
from mmbcn.engine.data_check import check_folders

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from _common import add_config_args, make_parser, read_config, run

SHOWN = 20  # files named for each kind of finding


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    add_config_args(parser)
    add = parser.add_argument
    add("--split", nargs="+", choices=SPLITS, help="what to examine (default: all of the config)")
    add("--show-dir", type=Path, help="write overlays, class charts and the whole report there")
    add(
        "--fix-list",
        type=Path,
        metavar="FILE",
        help="write the names of the samples without an error, an ann_file for the config; "
        "FILE_train, ... where several datasets are examined",
    )
    add("--workers", type=int, default=num_cores(), help="number of processes (%(default)s)")
    return parser.parse_args()


def main() -> None:
    """Examine, report, and end with 1 where there are errors."""
    args = parse_args()
    cfg = read_config(args)
    splits = tuple(s for s in SPLITS if (s in args.split if args.split else True))
    check_folders(cfg, splits)
    diagnoses = examine(open_parts(cfg, splits), args.workers)
    print(format_report(diagnoses, SHOWN))
    if args.show_dir:
        show(diagnoses, args.show_dir)
    if args.fix_list:
        for name, path in write_fix_lists(diagnoses, args.fix_list).items():
            print(f"samples of {name} without an error: {path} (set ann_file={path.resolve()})")
    sys.exit(any(finding.is_error for d in diagnoses for finding in d.findings))


def show(diagnoses: list[Diagnosis], folder: Path) -> None:
    """Write the report and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.txt"]
    paths[0].write_text(format_report(diagnoses) + "\n")
    for diagnosis in diagnoses:
        if diagnosis.same_as is None:
            paths += write_pictures(diagnosis, folder)
    print("written: " + ", ".join(map(str, paths)))


if __name__ == "__main__":
    run(main)
