"""Show what is in a checkpoint: meta, norms, entries and faults; or how two differ.

Ends with 1 where a checkpoint has faults: non-finite values, or variances that are not positive.

Example:
    python tools/checkpoints/inspect.py work_dirs/NAME/iter_20000.pth --filter 'layer4.*running'
"""

import sys
from pathlib import Path

sys.path.pop(0)  # else this file hides Python's own inspect
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import difflib
import math
import re
from typing import Any

from _common import add_trust_arg, make_parser, run
from prettytable import PrettyTable

from mmbcn.checkpoints.fetch import fetch
from mmbcn.checkpoints.inspect import differences, entries, summary
from mmbcn.checkpoints.key_maps import State, find_state
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.errors import UsageError

MAX_WIDTH = 100


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("checkpoint", help="checkpoint file or URL")
    parser.add_argument("other", nargs="?", help="a second one, to show how it differs")
    parser.add_argument("--filter", metavar="REGEX", help="only entries whose name matches")
    add_trust_arg(parser)
    return parser.parse_args()


def main() -> None:
    """Print the tables, and end with 1 where there are faults."""
    args = parse_args()
    try:
        pattern = re.compile(args.filter or "")
    except re.error as error:
        raise UsageError(f"--filter {args.filter!r} is no regular expression: {error}") from None
    names = [name for name in (args.checkpoint, args.other) if name]
    checkpoints = [read_checkpoint(fetch(n), trust_pickle=args.trust_pickle) for n in names]
    states = [find_state(c, n) for c, n in zip(checkpoints, names, strict=True)]
    show_summaries(names, checkpoints, states)
    chosen = [{k: v for k, v in s.items() if pattern.search(k)} for s in states]
    if not any(chosen):
        raise UsageError(f"no entry matches --filter {args.filter!r}")
    if args.other:
        show_differences(chosen)
        show_configs(checkpoints)
    else:
        show_entries(chosen[0])
    faults = [
        f"{n}: {e.key}: {', '.join(e.faults)}"
        for n, s in zip(names, states, strict=True)
        for e in entries(s)
        if e.faults
    ]
    if faults:
        print("faults:\n  " + "\n  ".join(faults))
    sys.exit(bool(faults))


def show_summaries(
    names: list[str], checkpoints: list[dict[str, Any]], states: list[State]
) -> None:
    """One column for each checkpoint."""
    columns = [summary(c, s) for c, s in zip(checkpoints, states, strict=True)]
    table = new_table(["", *names])
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row([label, *(column.get(label, "") for column in columns)])
    print(table)


def show_entries(state: State) -> None:
    """One row for each tensor."""
    table = new_table(["entry", "dtype", "shape", "values", "mean", "std", "faults"])
    for e in entries(state):
        row = [e.key, e.dtype, e.shape, e.numel, f"{e.mean:.4g}", f"{e.std:.4g}"]
        table.add_row([*row, ", ".join(e.faults)])
    table.align["values"] = table.align["mean"] = table.align["std"] = "r"
    print(table)
    print(f"{len(state)} entries, {sum(v.numel() for v in state.values()):,} values")


def show_differences(states: list[State]) -> None:
    """One row for each tensor that differs, and a list of what only one has."""
    changed, others = differences(*states)
    table = new_table(["entry", "largest difference", "relative difference"])
    for d in sorted(changed, key=lambda d: (not math.isnan(d.relative), -d.relative)):
        table.add_row([d.key, f"{d.largest:.4g}", f"{d.relative:.4g}"])
    if changed:
        print(table)
    same = len(states[0].keys() & states[1].keys()) - len(changed)
    print(f"{len(changed)} entries differ in value, {same} are equal")
    if others:
        print(f"{len(others)} cannot be compared:\n  " + "\n  ".join(others))


def show_configs(checkpoints: list[dict[str, Any]]) -> None:
    """The lines in which the configs differ."""
    texts = [str((c.get("meta") or {}).get("cfg", "")).splitlines() for c in checkpoints]
    lines = list(difflib.unified_diff(*texts, "the first's config", "the second's", "", "", 0, ""))
    if lines:
        print("\n".join(lines))


def new_table(names: list[str]) -> PrettyTable:
    """A table aligned to the left, whose wide columns are wrapped."""
    table = PrettyTable(names, align="l")
    table.max_width = MAX_WIDTH if len(names) < 3 else MAX_WIDTH // 2
    return table


if __name__ == "__main__":
    run(main)
