"""What a norm does to a network: its statistics, measured exactly."""

from mmbcn.analysis.calibration import Calibration, LayerChange, calibrate
from mmbcn.analysis.relu_inputs import ReluInputs
from mmbcn.analysis.singularity import (
    LayerSingularity,
    Singularity,
    SingularityMeter,
    measure_singularity,
)
from mmbcn.analysis.tracking import track
from mmbcn.analysis.weight_noise import WeightNoise

__all__ = [
    "Calibration",
    "LayerChange",
    "LayerSingularity",
    "ReluInputs",
    "Singularity",
    "SingularityMeter",
    "WeightNoise",
    "calibrate",
    "measure_singularity",
    "track",
]
