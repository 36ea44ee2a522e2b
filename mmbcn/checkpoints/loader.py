"""Mmengine's doors to checkpoints, led through our reader and our report.

Importing this module registers both with mmengine: how files and URLs are read, and
``init_cfg=dict(type='Pretrained')``. Its own ``load_checkpoint`` then reads safely too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmengine.logging import print_log
from mmengine.model import PretrainedInit
from mmengine.model.weight_init import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner.checkpoint import CheckpointLoader, _load_checkpoint
from torch import nn

from mmbcn.checkpoints.fetch import URL_SCHEMES, ZOO_SCHEMES, fetch
from mmbcn.checkpoints.fit import fit_checkpoint
from mmbcn.checkpoints.read import read_checkpoint
from mmbcn.errors import UsageError

_OPTIONS = {"trust_pickle": False, "allow_partial": False}


@contextmanager
def load_options(cfg: Mapping[str, Any]) -> Iterator[None]:
    """Load by the keys ``trust_pickle`` and ``allow_partial`` of a config."""
    before = dict(_OPTIONS)
    _OPTIONS.update((key, bool(cfg.get(key, False))) for key in _OPTIONS)
    try:
        yield
    finally:
        _OPTIONS.update(before)


@CheckpointLoader.register_scheme(prefixes=["", *URL_SCHEMES, *ZOO_SCHEMES], force=True)
def load_from_disk(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint as `read_checkpoint` does, from wherever `fetch` finds it."""
    path = fetch(filename)
    try:
        return read_checkpoint(path, map_location, _OPTIONS["trust_pickle"])
    except UsageError as error:
        if "://" not in filename:
            raise
        raise UsageError(
            f"{error}\nIt was downloaded from {filename}; delete it to download it again"
        ) from error


@WEIGHT_INITIALIZERS.register_module(name="Pretrained", force=True)
class Pretrained(PretrainedInit):
    """Mmengine's ``Pretrained``, for foreign checkpoints too, with a report.

    Args:
        checkpoint: path, URL, ``torchvision://NAME`` or ``open-mmlab://NAME``.
        prefix: load only what begins with it, such as ``'backbone.'``.
        map_location: as in ``torch.load``.

    Raises:
        UsageError: the file cannot be read, or too little of it fits.
    """

    def __call__(self, module: nn.Module) -> None:
        """Load the checkpoint into ``module``."""
        checkpoint = _load_checkpoint(self.checkpoint, self.map_location, logger="current")
        state, report = fit_checkpoint(
            module,
            checkpoint,
            self.checkpoint,
            prefix=self.prefix,
            allow_partial=_OPTIONS["allow_partial"],
        )
        module.load_state_dict(state, strict=False)
        print_log(report.text(), logger="current")
        if hasattr(module, "_params_init_info"):
            update_init_info(module, init_info=self._get_init_info())
