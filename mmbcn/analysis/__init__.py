"""What a norm does to a network: its statistics, measured exactly."""

from mmbcn.analysis.calibration import Calibration, LayerChange, calibrate
from mmbcn.analysis.tracking import track
from mmbcn.analysis.weight_noise import WeightNoise

__all__ = ["Calibration", "LayerChange", "WeightNoise", "calibrate", "track"]
