"""Finds missing folders and files before a run starts, and says what to do."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmengine.dataset import Compose

from mmbcn.errors import UsageError

_LAYOUTS = ("cityscapes", "voc", "camvid")  # that tools/datasets/shapes.py writes


def check_folders(cfg: Mapping[str, Any], splits: tuple[str, ...]) -> None:
    """Check that each dataset's folders, list file, and listed images and labels exist.

    Args:
        cfg: a whole config.
        splits: of 'train', 'val' and 'test'.

    Raises:
        UsageError: names the split, the dataset, and the first path that is missing.
    """
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        for key, dataset in _datasets((loader or {}).get("dataset"), f"{split}_dataloader.dataset"):
            _check(split, key, dataset)


def _datasets(node: Any, key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The datasets inside wrappers, each with its key in the config."""
    if isinstance(node, (list, tuple)):
        for i, item in enumerate(node):
            yield from _datasets(item, f"{key}.{i}")
    elif isinstance(node, Mapping):
        inner = next((name for name in ("dataset", "datasets") if name in node), None)
        if inner:
            yield from _datasets(node[inner], f"{key}.{inner}")
        else:
            yield key, node


def _check(split: str, key: str, dataset: Mapping[str, Any]) -> None:
    root = dataset.get("data_root") or ""
    prefix = dataset.get("data_prefix") or {}
    folders = {k: os.path.join(root, v) for k, v in prefix.items() if isinstance(v, str)}  # noqa: PTH118
    if any("://" in path or path.startswith("s3:") for path in folders.values()):
        return
    kind = str(dataset.get("type", "dataset")).rpartition(".")[2]
    for name, path in folders.items():
        if not Path(path).is_dir():
            raise UsageError(_missing(split, key, kind, f"the folder {path} ({name})", root))
    ann_file = dataset.get("ann_file")
    if not ann_file:
        return
    listing = Path(root, ann_file)
    if not listing.exists():
        raise UsageError(_missing(split, key, kind, f"the list {listing}", root))


def _missing(split: str, key: str, kind: str, what: str, root: str) -> str:
    layout = next((name for name in _LAYOUTS if name in kind.lower()), None)
    text = (
        f"{kind} ({split}): {what} does not exist. Put or link the dataset there, or say where it "
        f"is: --cfg-options {key}.data_root=PATH"
    )
    if layout:
        text += (
            "\nTo try the config without it: "
            f"python tools/datasets/shapes.py --layout {layout} --out {root or 'PATH'}"
        )
    return text


def check_files(dataset: Any, split: str) -> None:
    """Check that every image and label of a built dataset exists; lists each folder once.

    Raises:
        UsageError: names some of the missing files.
    """
    for part in _parts(dataset):
        if not hasattr(part, "get_data_info"):
            continue
        infos = [part.get_data_info(i) for i in range(len(part))]
        paths = [info.get(key) for info in infos for key in ("img_path", "seg_map_path")]
        local = [Path(p) for p in paths if p and "://" not in str(p)]
        names = {folder: set(_names(folder)) for folder in {p.parent for p in local}}
        missing = [str(p) for p in local if p.name not in names[p.parent]]
        if missing:
            raise UsageError(
                f"{type(part).__name__} ({split}): {len(missing)} of {len(local)} files are "
                f"missing: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
            )


def watch_reading(dataset: Any) -> None:
    """Check that a built dataset has images; let mistakes in its files be named as they are read.

    Raises:
        UsageError: it has none. In reading, later: an image or a label that cannot be read, or
            whose sizes differ.
    """
    for part in _parts(dataset):
        if not len(part):
            raise UsageError(no_images(part))
        if isinstance(getattr(part, "pipeline", None), Compose):
            part.pipeline = _NamingPipeline(part.pipeline.transforms)


def no_images(dataset: Any) -> str:
    """What to say of a dataset without images."""
    folder = (getattr(dataset, "data_prefix", None) or {}).get("img_path")
    listed = f", listed in {dataset.ann_file}" if getattr(dataset, "ann_file", None) else ""
    return (
        f"{type(dataset).__name__} found no image: expected files that end in "
        f"{getattr(dataset, 'img_suffix', '?')!r} in {folder}{listed}. Check data_root, "
        "data_prefix, img_suffix and ann_file of the dataset"
    )


def _parts(dataset: Any) -> Iterator[Any]:
    """The datasets inside wrappers."""
    inner = getattr(dataset, "datasets", None) or [getattr(dataset, "dataset", None)]
    for part in inner:
        if part is None:
            yield dataset
        else:
            yield from _parts(part)


class _NamingPipeline(Compose):
    """A pipeline whose reading transforms name the file that they fail on."""

    def __call__(self, data: dict[str, Any]) -> dict[str, Any] | None:
        for transform in self.transforms:
            if not type(transform).__name__.startswith("Load"):
                data = transform(data)
            else:
                data = _read(transform, data)
            if data is None:
                return None
        return data


def _read(transform: Any, data: dict[str, Any]) -> dict[str, Any] | None:
    had_label = "gt_seg_map" in data
    path = data.get("seg_map_path" if "img" in data else "img_path")
    try:
        data = transform(data)
    except Exception as error:  # whatever a decoder raises
        raise UsageError(
            f"cannot read {path} ({type(error).__name__}: {error}). Replace the file, or take it "
            "out of the dataset; python tools/datasets/check.py CONFIG finds all such files"
        ) from error
    label = (data or {}).get("gt_seg_map")
    size = (data or {}).get("ori_shape")
    if label is not None and not had_label and size and label.shape[:2] != tuple(size):
        raise UsageError(
            f"{path} has {'x'.join(map(str, label.shape))} pixels (height x width), but its image "
            f"{data.get('img_path')} has {'x'.join(map(str, size))}. They must be of one size; "
            "python tools/datasets/check.py CONFIG finds all such pairs"
        )
    return data


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []  # noqa: PTH208
