"""Hooks, one per file."""

from mmbcn.engine.hooks.label_check_hook import LabelCheckHook
from mmbcn.engine.hooks.non_finite_hook import NonFiniteHook
from mmbcn.engine.hooks.norm_guard_hook import NormGuardHook
from mmbcn.engine.hooks.panel_hook import PanelHook

__all__ = ["LabelCheckHook", "NonFiniteHook", "NormGuardHook", "PanelHook"]
