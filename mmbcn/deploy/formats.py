"""The formats of exported files: how each is written, and how it is run."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmbcn.deploy.segmenter import INPUT, OUTPUTS, Segmenter
from mmbcn.errors import UsageError

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # images -> labels and logits

_BATCH = 3  # of images for a dynamic trace: of 1, a tracer would take it for a constant
_SIDES = {1: "height", 2: "width"}  # the dynamic axes
LEAST_SIDE = 32  # what they are at least, in pixels
METADATA = "metadata.json"  # of the formats of torch: the name of the file inside of theirs


def needed(package: str) -> ModuleType:
    """A module of the extra ``deploy``.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        name = package.partition(".")[0]
        if (error.name or "").partition(".")[0] != name:
            raise
        raise UsageError(f"ONNX files need {name}: pip install 'mmbcn[deploy]'") from None


def write_onnx(
    segmenter: Segmenter,
    images: Tensor,
    dynamic: bool,
    metadata: Mapping[str, str],
    path: Path,
    opset: int,
) -> None:
    """Write an ONNX file; metadata becomes its ``metadata_props``.

    Raises:
        UsageError: a package is missing, or the model cannot be exported with that opset.
    """
    needed("onnxscript")
    onnx = needed("onnx")
    names = dict(input_names=[INPUT], output_names=list(OUTPUTS))
    program = _exported(segmenter, images, dynamic)
    with _quiet("ONNX", f" with opset {opset}"):
        program = torch.onnx.export(program, opset_version=opset, verbose=False, **names)
    proto = program.model_proto
    written = next(used.version for used in proto.opset_import if not used.domain)
    if written != opset:  # the exporter stays with its own where it cannot convert
        raise UsageError(f"the installed onnx writes no opset {opset}: give another --opset")
    onnx.helper.set_model_props(proto, dict(metadata))
    path.write_bytes(proto.SerializeToString())


def write_torchscript(
    segmenter: Segmenter, images: Tensor, dynamic: bool, metadata: Mapping[str, str], path: Path
) -> None:
    """Write a traced TorchScript file; its shapes are dynamic as far as the model's code is."""
    with _quiet("TorchScript"):
        traced = torch.jit.trace(segmenter, images, check_trace=False)
    with path.open("wb") as file:
        torch.jit.save(traced, file, _extra_files={METADATA: _as_object(metadata)})


def write_exported(
    segmenter: Segmenter, images: Tensor, dynamic: bool, metadata: Mapping[str, str], path: Path
) -> None:
    """Write what ``torch.export`` makes (``.pt2``)."""
    program = _exported(segmenter, images, dynamic)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA: _as_object(metadata)})


def onnx_run(path: Path) -> Run:
    """A function that runs an ONNX file, on as many threads as torch does."""
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(list(OUTPUTS), {INPUT: images}))


def torchscript_run(path: Path) -> Run:
    """A function that runs a TorchScript file."""
    return _torch_run(torch.jit.load(str(path)))


def exported_run(path: Path) -> Run:
    """A function that runs a file of ``torch.export``."""
    with path.open("rb") as file:
        return _torch_run(torch.export.load(file).module())


class Format(NamedTuple):
    """How files of a format are called, written and run."""

    suffix: str
    write: Callable[..., None]
    run: Callable[[Path], Run]


FORMATS = {
    "onnx": Format(".onnx", write_onnx, onnx_run),
    "torchscript": Format(".ts", write_torchscript, torchscript_run),
    "exported": Format(".pt2", write_exported, exported_run),
}


def _torch_run(function: Callable[[Tensor], tuple[Tensor, ...]]) -> Run:
    @torch.no_grad()
    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        return tuple(out.numpy() for out in function(torch.from_numpy(images)))

    return run


def _exported(segmenter: Segmenter, images: Tensor, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic:
        images = images[:1].expand(_BATCH, -1, -1, -1).contiguous()
        sides = {axis: torch.export.Dim(name, min=LEAST_SIDE) for axis, name in _SIDES.items()}
        shapes = ({0: torch.export.Dim("batch"), **sides},)
    with _quiet("torch.export"):
        return torch.export.export(segmenter, (images,), dynamic_shapes=shapes)


def _as_object(metadata: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in metadata.items()) + "}"


@contextmanager
def _quiet(what: str, how: str = "") -> Iterator[None]:
    """No warnings of packages that are not needed; what a model cannot, in one message."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    except UsageError:
        raise
    except Exception as error:  # of many kinds: whatever the exporter meets in the model
        text = str(error).strip() or type(error).__name__
        raise UsageError(f"{what}{how} cannot export this model: {text[:2000]}") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
