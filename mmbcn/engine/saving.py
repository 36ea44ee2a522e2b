"""Finds the checkpoint that a run goes on from."""

from logging import Logger
from pathlib import Path

from mmbcn.checkpoints.loader import load_from_disk
from mmbcn.checkpoints.write import PART
from mmbcn.errors import UsageError


def check_resumable(path: str | Path) -> None:
    """Check that a run can go on from a local checkpoint.

    Raises:
        UsageError: it cannot be read, or is no training checkpoint of mmengine; names the file.
    """
    if "://" in str(path):
        return
    content = load_from_disk(str(path), "cpu")
    missing = [k for k in ("meta", "state_dict", "message_hub", "optimizer") if k not in content]
    missing += [f"meta.{k}" for k in ("epoch", "iter") if k not in (content.get("meta") or {})]
    if missing:
        raise UsageError(
            f"a run cannot be resumed from {path}: it has no {', '.join(missing)}, so it is no "
            "checkpoint that training saves to go on from (best_*.pth and published files are "
            "not). To start a new run from its weights: --cfg-options load_from=PATH"
        )


def find_checkpoint(work_dir: str | Path, logger: Logger) -> str | None:
    """The checkpoint to resume from: the one in ``last_checkpoint``, else the newest that is whole.

    Removes what an interrupted writing left behind.

    Raises:
        UsageError: there are checkpoints, and none can be resumed from.
    """
    work_dir = Path(work_dir)
    for part in work_dir.glob(f"*{PART}"):
        part.unlink()
    pointer = work_dir / "last_checkpoint"
    named = pointer.read_text().strip() if pointer.is_file() else ""
    if "://" in named:
        return named
    found = sorted(work_dir.glob("*.pth"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if named:
        path = Path(named)
        found.insert(0, path if path.is_file() else work_dir / path.name)  # the folder has moved
    elif found:
        logger.warning(f"{pointer} is {'empty' if pointer.is_file() else 'missing'}")
    reasons = {}
    for path in dict.fromkeys(found):
        try:
            check_resumable(path)
        except UsageError as error:
            reasons[path] = error
            logger.warning(f"Not resumed from {path}: {error}")
        else:
            if reasons or not named:
                logger.warning(f"Resumes from {path}, the newest checkpoint that can be")
            return str(path)
    if reasons:
        raise UsageError(
            f"none of the {len(reasons)} checkpoints in {work_dir} can be resumed from: "
            f"{'; '.join(map(str, reasons.values()))}. To start over, choose another --work-dir"
        )
    return None
