"""What a norm does to a network: its statistics, measured exactly."""

from mmbcn.analysis.calibration import Calibration, LayerChange, calibrate
from mmbcn.analysis.relu_inputs import ReluInputs
from mmbcn.analysis.singularity import (
    LayerSingularity,
    Singularity,
    SingularityMeter,
    measure_singularity,
)

__all__ = [
    "Calibration",
    "LayerChange",
    "LayerSingularity",
    "ReluInputs",
    "Singularity",
    "SingularityMeter",
    "calibrate",
    "measure_singularity",
]
