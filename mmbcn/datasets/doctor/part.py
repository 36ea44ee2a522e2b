"""The datasets of a config: their files and how the config reads them."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from mmseg.datasets import BaseSegDataset

from mmbcn.errors import UsageError

SPLITS = ("train", "val", "test")
PICTURES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")


class Reader(NamedTuple):
    """How a config reads a sample, and what it expects.

    Attributes:
        load_image: the config's transforms that load the image.
        load_label: the config's transforms that load the label.
        num_classes: number of classes; None: not known.
        ignore_index: the label value that is ignored.
        backend_args: of mmengine's file layer.
    """

    load_image: list[Any]
    load_label: list[Any]
    num_classes: int | None
    ignore_index: int
    backend_args: dict[str, Any] | None


class Part(NamedTuple):
    """One dataset of a split; a split has several where its config concatenates them.

    Attributes:
        name: the split, and a number where it has several datasets.
        split: 'train', 'val' or 'test'.
        dataset: the dataset, without its pipeline.
        reader: how its samples are read.
        samples: what the dataset says of each sample: its paths and how its label is mapped.
        preprocessor: the model's ``data_preprocessor``.
        head_classes: ``num_classes`` of the model's heads.
    """

    name: str
    split: str
    dataset: Any
    reader: Reader
    samples: list[dict[str, Any]]
    preprocessor: Mapping[str, Any]
    head_classes: list[int]

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes; numbers where the dataset has none."""
        names = self.dataset.metainfo.get("classes")
        return names or [str(index) for index in range(self.reader.num_classes or 0)]

    def paths(self) -> list[tuple[str, str | None]]:
        """The image and the label of each sample."""
        return [(str(info["img_path"]), info.get("seg_map_path")) for info in self.samples]


def open_parts(cfg: Mapping[str, Any], splits: Sequence[str]) -> list[Part]:
    """Build the datasets of some splits; only their lists of files are read.

    Args:
        cfg: a whole config, or one with data loaders only.
        splits: of ``SPLITS``.

    Raises:
        UsageError: No dataset in these splits, or one that cannot be built.
    """
    parts = []
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmseg"):
        for split in splits:
            leaves = list(_leaves((cfg.get(f"{split}_dataloader") or {}).get("dataset")))
            for index, leaf in enumerate(leaves):
                name = f"{split}.{index}" if len(leaves) > 1 else split
                parts.append(_open(cfg, name, split, leaf))
    if not parts:
        raise UsageError(
            f"the config has no dataset in {', '.join(f'{s}_dataloader' for s in splits)}"
        )
    return parts


def find_orphans(parts: Sequence[Part], part: Part) -> list[str]:
    """The labels in the folder of a part that reads it whole, which no part has an image for."""
    dataset = part.dataset
    folder = (getattr(dataset, "data_prefix", None) or {}).get("seg_map_path")
    if not isinstance(dataset, BaseSegDataset) or not folder or not Path(folder).is_dir():
        return []
    if dataset._indices is not None or (dataset.ann_file and not Path(dataset.ann_file).is_dir()):
        return []
    known = {Path(label) for other in parts for _, label in other.paths() if label}
    labels = (path for path in Path(folder).rglob(f"*{dataset.seg_map_suffix}") if path.is_file())
    return sorted(str(path) for path in labels if path not in known)


def other_suffixes(part: Part) -> str:
    """The suffixes of pictures that are in the folder of the images and are not looked for."""
    folder = (getattr(part.dataset, "data_prefix", None) or {}).get("img_path")
    if not folder or not Path(folder).is_dir():
        return ""
    names = [path.name for path in Path(folder).rglob("*") if path.suffix.lower() in PICTURES]
    return ", ".join(
        sorted({Path(n).suffix for n in names if not n.endswith(part.dataset.img_suffix)})
    )


def _leaves(node: Any) -> Iterator[Mapping[str, Any]]:
    """The datasets inside wrappers."""
    if isinstance(node, (list, tuple)):
        for item in node:
            yield from _leaves(item)
    elif isinstance(node, Mapping):
        if "dataset" in node or "datasets" in node:
            yield from _leaves(node.get("dataset", node.get("datasets")))
        else:
            yield node


def _open(cfg: Mapping[str, Any], name: str, split: str, leaf: Mapping[str, Any]) -> Part:
    leaf = copy.deepcopy(leaf)
    steps = leaf.get("pipeline") or []
    try:
        dataset = _build(dict(leaf, pipeline=[]))
        samples = [dataset.get_data_info(index) for index in range(len(dataset))]
        load_image, load_label = _loaders(steps)
    except Exception as error:  # whatever a dataset's class may raise
        reason = str(error) or "it gives no reason; look whether its folders and lists exist"
        raise UsageError(
            f"the dataset {leaf.get('type')} of {split} cannot be built: "
            f"{type(error).__name__}: {reason}"
        ) from error
    if samples and not samples[0].get("img_path"):
        raise UsageError(f"the dataset {leaf.get('type')} of {split} names no image files")
    model = cfg.get("model") or {}
    heads = [*_heads(model.get("decode_head")), *_heads(model.get("auxiliary_head"))]
    head_classes = [head["num_classes"] for head in heads if head.get("num_classes")]
    classes = dataset.metainfo.get("classes")
    ignored = [head["ignore_index"] for head in heads if head.get("ignore_index") is not None]
    reader = Reader(
        load_image,
        load_label,
        len(classes) if classes else next(iter(head_classes), None),
        ignored[0] if ignored else getattr(dataset, "ignore_index", 255),
        getattr(dataset, "backend_args", None),
    )
    preprocessor = model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}
    return Part(name, split, dataset, reader, samples, preprocessor, head_classes)


def _build(config: dict[str, Any]) -> Any:
    try:
        # mmengine cannot serialize the list of an empty dataset
        return DATASETS.build(dict(config, serialize_data=False))
    except TypeError as error:
        if "serialize_data" not in str(error):
            raise
        return DATASETS.build(config)  # of a class that takes fewer arguments than mmengine's


def _heads(node: Any) -> list[Mapping[str, Any]]:
    return [head for head in (node if isinstance(node, (list, tuple)) else [node]) if head]


def _loaders(steps: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The transforms of a pipeline that load the image, and those that load the label."""
    load_image, load_label = [], []
    for step in steps:
        kind = step["type"]
        kind = kind if isinstance(kind, str) else kind.__name__
        if kind.rpartition(".")[2].startswith("Load"):
            (load_label if "Annotation" in kind else load_image).append(TRANSFORMS.build(step))
    return (
        load_image or [TRANSFORMS.build(dict(type="LoadImageFromFile"))],
        load_label or [TRANSFORMS.build(dict(type="LoadAnnotations"))],
    )
