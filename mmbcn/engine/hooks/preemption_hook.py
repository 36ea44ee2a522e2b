"""Saves a checkpoint when the job is asked to end."""

import signal
import threading
from types import FrameType
from typing import Any, NoReturn

import torch
from mmengine.dist import all_gather_object, all_reduce, barrier
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper

from mmbcn.engine.hooks.safe_checkpoint_hook import SafeCheckpointHook
from mmbcn.registry import HOOKS

EXIT_CODE = 128 + signal.SIGTERM  # 143, as shells report the end by this signal


@HOOKS.register_module()
class PreemptionHook(Hook):
    """On SIGTERM, finish the iteration, save a checkpoint and exit with code 143.

    Slurm sends SIGTERM to a job that is preempted, cancelled or out of time, and SIGKILL 30 s later
    (``KillWait``). It is enough that one rank gets the signal: the ranks agree after each iteration
    (one integer is exchanged) and stop together. ``--resume`` then goes on as if nothing had
    happened. While gradients are accumulated, the accumulation is finished first. A validation is
    broken off, and not repeated on resuming (not broken off where ranks have different numbers of
    batches to validate).
    """

    priority = "LOWEST"  # after the checkpoint hook

    def __init__(self) -> None:
        self.asked = False
        self.in_step = False
        self._handler: Any = None  # the one before; None: not listening

    def before_train(self, runner: Any) -> None:
        """Listen from here on."""
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, self._ask)

    def after_train(self, runner: Any) -> None:
        """Listen no more."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _agreed(self) -> bool:
        """Whether any rank was asked."""
        asked = torch.tensor(int(self.asked))
        all_reduce(asked, op="max")
        self.asked = bool(asked)
        return self.asked

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """Stop, if any rank was asked to."""
        wrapper = runner.optim_wrapper
        accumulating = isinstance(wrapper, OptimWrapper) and not wrapper.should_update()
        if self._agreed() and not accumulating:
            self._stop(runner, runner.iter + 1)

    def before_val_epoch(self, runner: Any) -> None:
        """See whether the ranks will go through the validation in step."""
        lengths = all_gather_object(len(runner.val_dataloader))
        self.in_step = self._handler is not None and len(set(lengths)) == 1

    def after_val_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: Any = None,
    ) -> None:
        """Stop within a validation that training waits for."""
        if self.in_step and self._agreed():
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # puts the trained weights back
            self._stop(runner, runner.iter)

    def _stop(self, runner: Any, iters: int) -> NoReturn:
        saved = "nothing (there is no checkpoint hook)"
        for hook in runner.hooks:
            if isinstance(hook, SafeCheckpointHook):
                saved = hook.save_now(runner, iters)
        barrier()  # a rank that ends has the launcher end the others
        runner.logger.warning(
            f"Asked to end (SIGTERM) after iteration {iters}; saved: {saved}. Exit code {EXIT_CODE}"
        )
        raise SystemExit(EXIT_CODE)
