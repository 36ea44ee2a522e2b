"""Fits every checkpoint that a run loads to its model, and stops where it is of another one."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper

import mmbcn.checkpoints.loader  # noqa: F401 (registers the reader)
from mmbcn.checkpoints.fit import fit_checkpoint
from mmbcn.errors import UsageError
from mmbcn.registry import HOOKS


@HOOKS.register_module()
class NormGuardHook(Hook):
    """Fit a checkpoint to the model before it is loaded, foreign ones too, and log a report.

    Testing and resuming need the same function: any difference stops. Training from a checkpoint
    (``load_from``) may start from another norm, which is logged, but not where the group stage of a
    batch-channel norm would be dropped; heads may be missing, and the classifier may have another
    number of classes.

    Raises:
        UsageError: says what the checkpoint has, what the model has, and what to do.
    """

    priority = "ABOVE_NORMAL"  # before EMAHook copies the weights

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replace the checkpoint's weights by those that the model takes, under its names."""
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        source = str(runner._load_from or "the checkpoint")
        if runner._resume and not {"meta", "message_hub"} <= set(checkpoint):
            raise UsageError(
                f"{source} cannot be resumed: it holds weights only, no iteration and optimizer. "
                "To start a training from it: --cfg-options load_from=PATH, without --resume"
            )
        state, report = fit_checkpoint(
            model,
            checkpoint,
            source,
            config=runner.cfg.pretty_text,
            exact=runner.testing or runner._resume,
            optional=("auxiliary_head",) if runner.testing else (),
            allow_partial=runner.cfg.get("allow_partial", False),
        )
        runner.logger.info(report.text())
        initial = model.state_dict()  # for what is missing: mmengine would list it once more
        checkpoint["state_dict"] = {**initial, **state}
