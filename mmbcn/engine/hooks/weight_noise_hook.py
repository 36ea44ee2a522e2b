"""Validates and tests with noisy weights."""

from typing import Any

from mmengine.hooks import Hook

from mmbcn.analysis.weight_noise import WeightNoise, check_noise
from mmbcn.registry import HOOKS


@HOOKS.register_module()
class WeightNoiseHook(Hook):
    """Run the model of validation and test with `WeightNoise`; all else sees the clean weights.

    On the command line of `test.py`::

        --cfg-options default_hooks.noise.type=mmbcn.WeightNoiseHook \
            default_hooks.noise.kind=additive default_hooks.noise.level=0.02

    Args:
        kind: ``"additive"``, ``"multiplicative"`` or ``"lognormal"``.
        level: eta.
        seed: of the noise, the same for all ranks; each validation begins with it.
        fresh: False: one noise for the whole validation or test; True: drawn anew each time a layer
            runs.

    Raises:
        UsageError: an unknown kind, a level or seed that is none.
    """

    priority = "VERY_HIGH"  # the clean weights are back before another hook saves them

    def __init__(self, kind: str, level: float, seed: int = 0, fresh: bool = False) -> None:
        check_noise(kind, level, seed)
        self.settings = dict(kind=kind, level=level, seed=seed, fresh=fresh)
        self.noise: WeightNoise | None = None

    def before_val_iter(
        self, runner: Any, batch_idx: int, data_batch: dict[str, Any] | None = None
    ) -> None:
        """Let the weights be noisy; it is drawn late, of averaged weights if they are used."""
        if batch_idx == 0:
            if self.noise is not None:
                self.noise.__exit__()  # an epoch before may have ended by an exception
            self.noise = WeightNoise(runner.model, **self.settings)
        self.noise.__enter__()

    def after_val_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: dict[str, Any] | None = None,
        outputs: Any = None,
    ) -> None:
        """Put the weights back."""
        self.noise.__exit__()

    before_test_iter = before_val_iter
    after_test_iter = after_val_iter
