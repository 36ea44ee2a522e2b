"""The runner that switches norms and checks data and checkpoints, and its hooks."""

from mmbcn.errors import missing_package

try:
    import mmseg  # noqa: F401
except ModuleNotFoundError as error:
    raise missing_package("mmbcn.engine", error.name or "mmseg") from error

from mmbcn.engine.autocast import BFloat16OptimWrapper
from mmbcn.engine.hooks import (
    ENormHook,
    LabelCheckHook,
    NonFiniteHook,
    NormGuardHook,
    NormMomentumHook,
    PanelHook,
    PreemptionHook,
    RandomStateHook,
    RecordHook,
    SafeCheckpointHook,
    SingularityHook,
    SyncBuffersHook,
    WeightNoiseHook,
)
from mmbcn.engine.runner import NormRunner

__all__ = [
    "BFloat16OptimWrapper",
    "ENormHook",
    "LabelCheckHook",
    "NonFiniteHook",
    "NormGuardHook",
    "NormMomentumHook",
    "NormRunner",
    "PanelHook",
    "PreemptionHook",
    "RandomStateHook",
    "RecordHook",
    "SafeCheckpointHook",
    "SingularityHook",
    "SyncBuffersHook",
    "WeightNoiseHook",
]
