"""Saves checkpoints so that one to resume from is there at any time."""

from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook

from mmbcn.checkpoints.write import whole_file
from mmbcn.errors import UsageError, nearest
from mmbcn.registry import HOOKS


class _RemoveLater:
    """A file backend that keeps what is to be removed until the end."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self.paths: list[str] = []

    def remove(self, path: str) -> None:
        self.paths.append(path)

    rmtree = remove

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook``, which `NormRunner` replaces by this one.

    mmengine removes the outdated checkpoint first, then writes the new one in place, then writes
    ``last_checkpoint`` in place: a process that dies meanwhile may leave nothing to resume from.
    Here the order is: the new checkpoint, ``last_checkpoint``, removal; each file appears whole.
    All ranks get the event ``before_checkpoint`` first, for hooks that collect something from them.

    Args: those of mmengine's hook.

    Raises:
        UsageError: ``save_best`` is no metric of the validation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key in self.args:  # mmengine takes any, and fails on them when it first saves
            raise TypeError(f"CheckpointHook.__init__() got an unexpected keyword argument {key!r}")

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        outdated = None
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated = self.keep_ckpt_ids.popleft()
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        self._save_last(runner, self.filename_tmpl.format(step), meta)
        if outdated is not None and is_main_process():
            name = self.filename_tmpl.format(outdated)
            _remove(self.file_backend, self.file_backend.join_path(self.out_dir, name))

    def _save_last(self, runner: Any, name: str, meta: dict[str, Any]) -> None:
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.call_hook("before_checkpoint")
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
        )
        if is_main_process():
            pointer = Path(runner.work_dir, "last_checkpoint")
            with whole_file(pointer, "name of the last checkpoint,") as part:
                part.write_text(self.last_ckpt)

    def save_now(self, runner: Any, iters: int) -> str:
        """Save after ``iters`` iterations, in the middle of an epoch too; returns the path."""
        meta = dict(epoch=runner.epoch, iter=iters)
        if self.by_epoch:
            self._save_last(runner, f"iter_{iters}.pth", meta)
        elif self.last_ckpt != self.file_backend.join_path(
            self.out_dir, self.filename_tmpl.format(iters)
        ):
            self._save_checkpoint_with_step(runner, iters, meta)
        return self.last_ckpt

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        for key in self.save_best or ():
            if key not in ("auto", *metrics):
                raise UsageError(
                    f"the checkpoint hook has save_best={key!r}, which is no metric of the "
                    f"validation{nearest(key, list(metrics))} It has: {', '.join(metrics)}"
                )
        backend = self.file_backend
        self.file_backend = later = _RemoveLater(backend)
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend
        best = getattr(self, "best_ckpt_path_dict", {}).values()
        for path in set(later.paths) - {getattr(self, "best_ckpt_path", None), *best}:
            _remove(backend, path)


def _remove(backend: Any, path: str) -> None:
    if backend.isfile(path):
        backend.remove(path)
    elif backend.isdir(path):  # of deepspeed
        backend.rmtree(path)
