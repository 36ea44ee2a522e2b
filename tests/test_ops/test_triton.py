"""The Triton backend: which tensors it is chosen for, its kernels compiled, and its results.

The results are checked by `triton_kernels.py`, in a process of its own: whether kernels are
interpreted is decided when triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbcn import BCN
from mmbcn.errors import UsageError
from mmbcn.ops.backend import backend_for, has_kernels

CHECKS = Path(__file__).with_name("triton_kernels.py")
MODES = [
    "interpreted",
    pytest.param("compiled", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU")),
]


@pytest.mark.parametrize("mode", MODES)
def test_results(mode):
    triton = pytest.importorskip("triton")
    version, numpy = (tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, np))
    if mode == "interpreted" and (version < (3, 3) or (version < (3, 7) and numpy >= (2, 5))):
        pytest.skip("this Triton's interpreter stores nothing, or stops, with this NumPy")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if mode == "interpreted":
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(CHECKS)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    large = torch.zeros(1, 1, 512, 512)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("MMBCN_BACKEND", raising=False)
    assert backend_for(large) == "aten"
    assert not has_kernels(large)
    monkeypatch.setenv("MMBCN_BACKEND", "triton")
    with pytest.raises(UsageError, match=r"CUDA tensor; got one on cpu.*TRITON_INTERPRET=1"):
        BCN(32)(torch.zeros(2, 32, 8, 8))
    monkeypatch.setenv("MMBCN_BACKEND", "cudnn")
    with pytest.raises(UsageError, match="known: auto, aten, triton, reference"):
        backend_for(large)


def test_the_interpreter_is_never_chosen_by_itself(monkeypatch):
    monkeypatch.delenv("MMBCN_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_for(torch.zeros(1, 1, 512, 512)) == "aten"


# what kernels are compiled for: dtypes of x and of statistics, sizes, tiles
TYPES = {"float32": ("fp32", "fp32"), "bfloat16": ("bf16", "fp32"), "float64": ("fp64", "fp64")}
CONTIGUOUS = dict(BLOCK_R=1, BLOCK_M=2048, LAST=False)
CHANNELS_LAST = dict(BLOCK_R=128, BLOCK_M=16, LAST=True)
OF_X = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "weight_ptr", "dw_ptr"}
WHOLE = {"steps_ptr": "*i64", "momentum": "fp64", "steps": "i32"}


def variants():
    """Kernel and constants, for each branch that a constant selects."""
    from mmbcn.ops import triton_estimates, triton_pass_kernels, triton_stage_kernels
    from mmbcn.ops import triton_weight_standardization as ws

    for tile in (CONTIGUOUS, CHANNELS_LAST):
        for name in ("moments", "scale_shift", "dots", "combine"):
            yield getattr(triton_pass_kernels, f"{name}_kernel"), tile
    yield triton_pass_kernels.merge_parts_kernel, dict(BLOCK_R=32, BLOCK_P=64)
    for parts in (1, 16):
        block = dict(BN_EPS=1e-5, BLOCK_N=2, BLOCK_K=64, BLOCK_P=parts)
        for update, micro in ((False, False), (True, False), (True, True)):
            constants = dict(UPDATE=update, MICRO=micro, WARMUP=micro, EPS=1e-5)
            yield triton_stage_kernels.forward_kernel, constants | block
        for through in (False, True):
            yield triton_stage_kernels.gradients_kernel, dict(THROUGH_BATCH=through, **block)
    for inside in (False, True):
        of_filters = dict(EPS=1e-5, TINY=ws._TINY, INSIDE=inside, DEGREES=575, BLOCK=1024)
        yield ws._standardize_kernel, of_filters
    yield ws._gradient_kernel, dict(BLOCK=2048)
    yield triton_estimates._batch_moments_kernel, dict(BLOCK=256)
    for micro in (False, True):
        constants = dict(MICRO=micro, WARMUP=micro, BLOCK=256)
        yield triton_estimates._update_kernel, constants


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", TYPES)
def test_kernels_compile_for_gpus(dtype, capability, monkeypatch, tmp_path):
    """To machine code, with no GPU here: what the interpreter lets pass may not compile."""
    triton = pytest.importorskip("triton", "3.3")  # whose functions are called here
    compiler = pytest.importorskip("triton.compiler")
    target = pytest.importorskip("triton.backends.compiler").GPUTarget("cuda", capability, 32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    of_x, of_statistics = TYPES[dtype]
    for kernel, constants in variants():
        names = [p.name for p in kernel.params]
        signature, constexprs, attributes = {}, {}, {}
        for i, name in enumerate(names):
            if name in constants:
                signature[name], constexprs[(i,)] = "constexpr", constants[name]
            elif name == "positions" and capability == 80:  # beyond 2^31
                signature[name] = "i64"
            elif name == "samples":  # one sample; such arguments are compiled in
                signature[name], constexprs[(i,)] = "constexpr", 1
            elif name.endswith("_ptr"):
                signature[name] = WHOLE.get(name, "*" + (of_x if name in OF_X else of_statistics))
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = WHOLE.get(name, "i32")
        source = compiler.ASTSource(kernel, signature, constexprs, attributes)
        assert triton.compile(source, target=target).asm["cubin"], kernel
