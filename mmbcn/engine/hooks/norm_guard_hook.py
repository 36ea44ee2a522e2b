"""Stops a run whose checkpoint is of another norm than its config."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper

from mmbcn.checkpoints.guard import config_norms, state_mismatch
from mmbcn.errors import UsageError
from mmbcn.registry import HOOKS


@HOOKS.register_module()
class NormGuardHook(Hook):
    """Compare a checkpoint's norms with the model's before it is loaded.

    Testing and resuming need the same function: any difference stops. Training from a checkpoint
    (``load_from``) may start from another norm, which is logged, but not where the group stage of a
    batch-channel norm would be dropped.

    Raises:
        UsageError: says what the checkpoint has, what the model has, and what to do.
    """

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Check, before the state dict goes into the model."""
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
            model = model.module
        difference = state_mismatch(model, checkpoint.get("state_dict", checkpoint))
        if difference:
            layer, ours, theirs = difference
            text = f"{layer} is a {ours} in the model and {theirs} in the checkpoint"
        else:
            stored = config_norms(str((checkpoint.get("meta") or {}).get("cfg", "")))
            ours, theirs = config_norms(runner.cfg.pretty_text), stored
            if stored is None or stored == ours:
                return
            ours, theirs = (" with ".join(sorted(kinds)) or "none" for kinds in (ours, theirs))
            text = f"the model has {ours}, the checkpoint was trained with {theirs}"
        exact = runner.testing or runner._resume
        if exact or theirs == "batch-channel norm":
            raise UsageError(
                f"the checkpoint is of another norm than the config: {text}. Give the config that "
                "it was trained with (saved beside it), or the same --norm"
            )
        runner.logger.warning(f"Starting from a checkpoint of another norm: {text}.")
