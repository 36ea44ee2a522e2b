"""Where and with what something was measured."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
_MM = ("mmengine", "mmcv", "mmsegmentation")


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Device, cores, threads, versions and commit: the last columns of every measurement.

    Args:
        device: as torch calls it; its name is given.
    """
    return dict(
        device=torch.cuda.get_device_name() if device.startswith("cuda") else _cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        commit=commit(),
    )


def mm_versions() -> dict[str, str]:
    """The versions of the mm packages, of either distribution."""
    names = {name: (f"onedl-{name}", name) for name in _MM}
    return {
        name: next((f"{n} {v}" for n in options if (v := _version(n))), "")
        for name, options in names.items()
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str:
    """The source's git commit, ``-changed`` where files differ from it; ``unknown`` without git."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        results = ":(exclude)tools/benchmark/results"
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", results)
        return git("rev-parse", "--short=10", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
