"""mmengine's Runner, with the norm switch and with checks before time is lost."""

import copy
from pathlib import Path
from typing import Any

import torch.distributed as dist
from mmengine.device import get_device
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

import mmbcn
from mmbcn.checkpoints.loader import load_options
from mmbcn.engine.config_check import check_keys, check_norm_cfgs, check_work_dir
from mmbcn.engine.data_check import check_files, check_folders, watch_reading
from mmbcn.engine.hooks import LabelCheckHook, NormGuardHook
from mmbcn.engine.mistakes import explained
from mmbcn.norms import set_norm
from mmbcn.registry import RUNNERS


@RUNNERS.register_module()
class NormRunner(Runner):
    """Runs any mm config, with its normalization switched to ``cfg.norm`` where that is given.

    Also stops early, with one clear message, where data is missing, labels are no classes, or a
    checkpoint does not fit. Its keys ``trust_pickle`` and ``allow_partial`` are `train.py`'s flags
    of these names. With an mm package's own tools, no file edited::

        mim train mmsegmentation CONFIG --cfg-options runner_type=mmbcn.NormRunner norm=bcn_ws

    Raises:
        UsageError: what to mend, in one message.
    """

    testing = False

    @classmethod
    def from_cfg(cls, cfg: Any) -> "NormRunner":
        """Build the runner from a config, switched by its key ``norm``."""
        cfg = copy.deepcopy(cfg)
        check_keys(cfg)
        if cfg.get("norm"):
            set_norm(cfg["model"], cfg["norm"])
        check_norm_cfgs(cfg["model"])
        check_work_dir(cfg["work_dir"])
        with explained():
            return super().from_cfg(cfg)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._checked: set[str] = set()  # splits whose files were looked for
        super().__init__(*args, **kwargs)
        for hook in (LabelCheckHook(), NormGuardHook()):
            self.register_hook(hook)

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Set up the environment; ranks on CPUs exchange over gloo (mmengine asks for CUDA)."""
        if self._launcher == "pytorch" and get_device() == "cpu" and not dist.is_initialized():
            dist.init_process_group("gloo")
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Wrap the model for several ranks, on CPUs too."""
        if model_wrapper_cfg is None and self.distributed and get_device() == "cpu":
            unused = self.cfg.get("find_unused_parameters", False)
            model_wrapper_cfg = dict(
                type="MMDistributedDataParallel",
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=unused,
            )
        return super().wrap_model(model_wrapper_cfg, model)

    def dump_config(self) -> None:
        """Save the config in the work_dir.

        As ``config.py`` where the work_dir lies in this package's source checkout: ``mim`` looks
        configs up there by base name, and a second file of the name would make it ambiguous.
        """
        checkout = Path(mmbcn.__file__).resolve().parents[1]
        inside = checkout in Path(self.work_dir).resolve().parents
        if not inside or self.cfg.filename is None:
            super().dump_config()
        elif self.rank == 0:
            self.cfg.dump(str(Path(self.work_dir, "config.py")))

    def train(self) -> nn.Module:
        """Check the data of the training and validation sets, then train."""
        check_keys(self.cfg, "train")
        check_folders(self.cfg, ("train", "val"))
        with explained(), load_options(self.cfg):
            return super().train()

    def val(self) -> dict[str, float]:
        """Check the data of the validation set, then validate."""
        self.testing = True
        check_keys(self.cfg, "val")
        check_folders(self.cfg, ("val",))
        with explained():
            return super().val()

    def test(self) -> dict[str, float]:
        """Check the data of the test set, then test."""
        self.testing = True
        check_keys(self.cfg, "test")
        check_folders(self.cfg, ("test",))
        with explained():
            return super().test()

    @staticmethod
    def build_dataloader(*args: Any, **kwargs: Any) -> DataLoader:
        """Build a data loader, whose dataset is then watched in reading."""
        loader = Runner.build_dataloader(*args, **kwargs)
        watch_reading(loader.dataset)
        return loader

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint by the config's ``trust_pickle`` and ``allow_partial``.

        `NormGuardHook` fits it to the model; of any origin that docs/checkpoints.md lists.
        """
        with load_options(self.cfg):
            return super().load_checkpoint(*args, **kwargs)

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        """Call the hooks; before the first pass over a split, check that its files exist."""
        split = fn_name.removeprefix("before_")
        if split in ("train", "val", "test") and split not in self._checked:
            check_files(getattr(self, f"{split}_loop").dataloader.dataset, split)
            self._checked.add(split)
        super().call_hook(fn_name, **kwargs)
