"""Keeps the random generators in checkpoints, so that a resumed run draws what it would have."""

from typing import Any

from mmengine.dist import all_gather_object, get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmbcn.engine.random_state import NumberedSampler, get_random_state, set_random_state
from mmbcn.registry import HOOKS


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Store every rank's generators and the data order; resume them; validate beside them.

    What the model draws (dropout) comes from the generators; what samples draw, from their numbers
    (`NumberedSampler`). A validation leaves no trace: a resumed run does not repeat the one that
    the interrupted run made right after the checkpoint.
    """

    priority = "VERY_HIGH"

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] | None = None  # of the ranks, since the last iteration
        self.resumed: dict[str, Any] | None = None

    def before_checkpoint(self, runner: Any) -> None:
        """Collect the states of all ranks, once after an iteration."""
        if self.states is None:
            self.states = all_gather_object(get_random_state())

    before_val = before_checkpoint

    def after_val(self, runner: Any) -> None:
        """Go back to where the validation began."""
        set_random_state(self.states[get_rank()])

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the states to a checkpoint that training can go on from."""
        if self.states is not None and "optimizer" in checkpoint:
            seed = getattr(runner.train_loop.dataloader.sampler, "seed", None)
            checkpoint["random_state"] = dict(seed=seed, ranks=self.states)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Take the states, if the run is resumed."""
        if not runner._resume:
            return
        self.resumed = checkpoint.get("random_state") or {}
        ranks = self.resumed.get("ranks", ())
        if len(ranks) != runner.world_size:
            runner.logger.warning(
                f"The checkpoint has the random states of {len(ranks)} ranks, and this run has "
                f"{runner.world_size} ranks: it goes on, but not bit by bit as if uninterrupted."
            )

    def before_train(self, runner: Any) -> None:
        """Put the data where the interrupted run was; in front of mmengine's own skipping."""
        loop = runner.train_loop
        sampler = loop.dataloader.sampler
        if not self.resumed or not isinstance(sampler, NumberedSampler):
            return
        if self.resumed["seed"] is not None:
            sampler.reseed(self.resumed["seed"])
        if isinstance(loop, EpochBasedTrainLoop):
            begun = loop.iter - loop.epoch * len(loop.dataloader)
            sampler.passed = begun * loop.dataloader.batch_size

    def before_train_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Resume this rank's generators before the first iteration."""
        self.states = None
        ranks = (self.resumed or {}).get("ranks", ())
        if len(ranks) == runner.world_size:
            set_random_state(ranks[runner.rank])
        self.resumed = None
