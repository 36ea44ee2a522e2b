"""mmengine's Runner, with the norm switch and with checks before time is lost."""

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, master_only
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

import mmbcn
from mmbcn.checkpoints.loader import load_options
from mmbcn.checkpoints.read import check_file
from mmbcn.checkpoints.write import whole_file
from mmbcn.engine.config_check import (
    check_keys,
    check_names,
    check_norm_cfgs,
    check_not_sharded,
    check_work_dir,
)
from mmbcn.engine.data_check import check_files, check_folders, watch_reading
from mmbcn.engine.hooks import (
    LabelCheckHook,
    NormGuardHook,
    PreemptionHook,
    RandomStateHook,
    SafeCheckpointHook,
    SyncBuffersHook,
)
from mmbcn.engine.mistakes import explained
from mmbcn.engine.random_state import NumberedSampler, ShelteredWorker
from mmbcn.engine.saving import check_resumable, find_checkpoint
from mmbcn.norms import set_norm
from mmbcn.registry import RUNNERS


@RUNNERS.register_module()
class NormRunner(Runner):
    """Runs any mm config, with its normalization switched to ``cfg.norm`` where that is given.

    Also stops early, with one clear message, where data is missing, labels are no classes, or a
    checkpoint does not fit. Its keys ``trust_pickle`` and ``allow_partial`` are `train.py`'s flags
    of these names. A run that ends at any time, killed or asked to (SIGTERM), goes on with
    ``resume=True`` as if nothing had happened; it always has the hooks for that:
    `SafeCheckpointHook`, `RandomStateHook`, `PreemptionHook`, and `SyncBuffersHook` for several
    ranks. With an mm package's own tools, no file edited::

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
        check_names(cfg)
        check_not_sharded(cfg)
        if cfg.get("norm"):
            set_norm(cfg["model"], cfg["norm"])
        check_norm_cfgs(cfg["model"])
        check_work_dir(cfg["work_dir"])
        source = str(cfg.get("load_from") or "")
        if source and "://" not in source:
            check_file(source)  # now, not when everything is built
        with explained():
            return super().from_cfg(cfg)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._checked: set[str] = set()  # splits whose files were looked for
        super().__init__(*args, **kwargs)
        for hook in (LabelCheckHook(), NormGuardHook(), RandomStateHook(), PreemptionHook()):
            self.register_hook(hook)
        if not any(isinstance(hook, SyncBuffersHook) for hook in self.hooks):
            self.register_hook(SyncBuffersHook())

    def register_hook(self, hook: Hook | dict[str, Any], priority: Any = None) -> None:
        """Register a hook; the safe one in place of mmengine's ``CheckpointHook``."""
        if isinstance(hook, dict) and hook.get("type") in ("CheckpointHook", CheckpointHook):
            hook = dict(hook, type=SafeCheckpointHook)
        super().register_hook(hook, priority)

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Set up the environment; ranks on CPUs exchange over gloo (mmengine asks for CUDA)."""
        if self._launcher == "pytorch" and get_device() == "cpu" and not dist.is_initialized():
            seconds = env_cfg.get("dist_cfg", {}).get("timeout")
            timeout = None if seconds is None else timedelta(seconds=seconds)
            dist.init_process_group("gloo", timeout=timeout)
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

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict[str, Any],
        seed: int | None = None,
        diff_rank_seed: bool = False,
    ) -> DataLoader:
        """Build a loader that draws nothing from this process; its workers outlast SIGTERM.

        The reading of its dataset is watched.
        """
        loader = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if isinstance(dataloader, dict):
            loader.generator = torch.Generator()
            loader.worker_init_fn = ShelteredWorker(loader.worker_init_fn)
        watch_reading(loader.dataset)
        return loader

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """Build the training loop, over samples that are numbered."""
        loader = self._train_dataloader
        if isinstance(loader, dict) and isinstance(loader.get("sampler"), dict):
            sampler = dict(type=NumberedSampler, sampler=loader["sampler"])
            self._train_dataloader = dict(loader, sampler=sampler)
        return super().build_train_loop(loop)

    def load_or_resume(self) -> None:
        """Load or resume; without a name, from the newest checkpoint that is whole."""
        if self._resume and not self._has_loaded:
            if self._load_from is None:
                found = [find_checkpoint(self.work_dir, self.logger) if self.rank == 0 else None]
                broadcast_object_list(found)
                self._load_from = found[0]
                if self._load_from is None:
                    self.logger.warning(f"No checkpoint in {self.work_dir}: starts anew")
                    return
            else:
                check_resumable(self._load_from)
        super().load_or_resume()

    @master_only
    def save_checkpoint(
        self,
        out_dir: str,
        filename: str,
        file_client_args: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save a checkpoint; on a local disk, it appears when it is whole."""
        if "://" in str(out_dir) or file_client_args or kwargs.get("backend_args"):
            super().save_checkpoint(out_dir, filename, file_client_args, **kwargs)
            return
        with whole_file(Path(out_dir, filename), "checkpoint") as part:
            super().save_checkpoint(out_dir, part.name, **kwargs)

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
