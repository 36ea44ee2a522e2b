"""Lists of the samples without an error, which a config can read as its ``ann_file``."""

from collections.abc import Sequence
from pathlib import Path

from mmseg.datasets import BaseSegDataset

from mmbcn.datasets.doctor.examine import Diagnosis
from mmbcn.datasets.doctor.part import Part
from mmbcn.datasets.prepare.convert import write_file
from mmbcn.errors import UsageError


def write_fix_lists(diagnoses: Sequence[Diagnosis], file: Path) -> dict[str, Path]:
    """Write the good samples of each part, one name a line.

    Args:
        diagnoses: as of ``examine``.
        file: the list; where several parts were examined, ``<stem>_<part><suffix>`` of it.

    Returns:
        The file of each part.

    Raises:
        UsageError: A dataset that reads no such list, or no good sample. Nothing is written.
    """
    examined = [diagnosis for diagnosis in diagnoses if diagnosis.same_as is None]
    lists = {}
    for diagnosis in examined:
        part = diagnosis.part
        name = f"{file.stem}_{part.name}{file.suffix}" if len(examined) > 1 else file.name
        good = [i for i in range(len(part.samples)) if i not in diagnosis.bad]
        if not good:
            raise UsageError(f"{part.name} has no sample without an error: no list is written")
        lists[part.name] = file.with_name(name), "".join(f"{_name(part, i)}\n" for i in good)
    for path, text in lists.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text.encode())
    return {name: path for name, (path, _) in lists.items()}


def _name(part: Part, index: int) -> str:
    """The line by which ``BaseSegDataset`` finds a sample: its path below the folder, no suffix."""
    dataset, path = part.dataset, part.samples[index]["img_path"]
    folder = (getattr(dataset, "data_prefix", None) or {}).get("img_path")
    if not isinstance(dataset, BaseSegDataset) or not folder or not path.startswith(folder):
        raise UsageError(
            f"{type(dataset).__name__} ({part.name}) reads no list of files: no list is written"
        )
    return path[len(folder) :].lstrip("/").removesuffix(dataset.img_suffix)
