"""What a norm does to a network: its statistics, measured exactly."""

from mmbcn.analysis.calibration import Calibration, LayerChange, calibrate

__all__ = ["Calibration", "LayerChange", "calibrate"]
