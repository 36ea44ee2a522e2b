"""An ONNX file with 8-bit weights and activations, calibrated on images."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mmbcn.deploy.formats import needed
from mmbcn.deploy.segmenter import INPUT

_QUANTIZED = ["Conv", "Gemm", "MatMul"]


def quantize(source: Path, target: Path, pictures: Iterable[np.ndarray]) -> None:
    """Write the file with its convolutions quantized; all else stays in float32.

    Static quantization of onnxruntime: weights int8 with a scale for each output channel, of which
    7 bits are used, as CPUs without VNNI add pairs of products in 16 bits, where those of 8 bits
    saturate. Activations uint8 with a scale and a zero point for each tensor, from the smallest to
    the largest value on the calibration images. Group normalization, additions and interpolation
    stay in float32.

    Args:
        source: the ONNX file.
        target: where to write.
        pictures: for calibration, (H, W, 3) uint8 of the sizes that the file takes.
    """
    needed("onnxruntime")
    quantization = needed("onnxruntime.quantization")
    prepare = needed("onnxruntime.quantization.shape_inference").quant_pre_process
    onnx = needed("onnx")

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self._pictures = iter(pictures)

        def get_next(self) -> dict[str, np.ndarray] | None:
            picture = next(self._pictures, None)
            return None if picture is None else {INPUT: picture[None]}

    with tempfile.TemporaryDirectory() as folder:
        prepared, written = Path(folder, "prepared.onnx"), Path(folder, "written.onnx")
        # its optimization would write GroupNormalization out in elementary operations
        prepare(str(source), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(written),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=_QUANTIZED,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=True,
        )
        proto = onnx.load(str(written))
        properties = {p.key: p.value for p in onnx.load(str(source)).metadata_props}
        onnx.helper.set_model_props(proto, properties | {"quantization": '"int8"'})
        target.write_bytes(proto.SerializeToString())
