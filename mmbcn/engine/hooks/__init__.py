"""Hooks, one per file."""

from mmbcn.engine.hooks.enorm_hook import ENormHook
from mmbcn.engine.hooks.label_check_hook import LabelCheckHook
from mmbcn.engine.hooks.non_finite_hook import NonFiniteHook
from mmbcn.engine.hooks.norm_guard_hook import NormGuardHook
from mmbcn.engine.hooks.norm_momentum_hook import NormMomentumHook
from mmbcn.engine.hooks.panel_hook import PanelHook
from mmbcn.engine.hooks.preemption_hook import PreemptionHook
from mmbcn.engine.hooks.random_state_hook import RandomStateHook
from mmbcn.engine.hooks.record_hook import RecordHook
from mmbcn.engine.hooks.safe_checkpoint_hook import SafeCheckpointHook
from mmbcn.engine.hooks.singularity_hook import SingularityHook
from mmbcn.engine.hooks.sync_buffers_hook import SyncBuffersHook
from mmbcn.engine.hooks.weight_noise_hook import WeightNoiseHook

__all__ = [
    "ENormHook",
    "LabelCheckHook",
    "NonFiniteHook",
    "NormGuardHook",
    "NormMomentumHook",
    "PanelHook",
    "PreemptionHook",
    "RandomStateHook",
    "RecordHook",
    "SafeCheckpointHook",
    "SingularityHook",
    "SyncBuffersHook",
    "WeightNoiseHook",
]
