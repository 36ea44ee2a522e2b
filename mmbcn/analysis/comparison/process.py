"""Runs a tool in a process of its own, and watches it."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from mmbcn.analysis.environment import ROOT

_POLL = 0.5  # seconds
_PATIENCE = 60  # seconds between asking a process to end, which then saves, and killing it
_INTERRUPTED = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, 130, 137, 143}
_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


@dataclass
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        seconds: how long it took.
        peak_bytes: the most memory that it had; None where the system does not say.
        message: what it said last, where it failed.
    """

    code: int
    seconds: float
    peak_bytes: int | None
    message: str

    @property
    def interrupted(self) -> bool:
        """Whether it was ended from outside, and could go on."""
        return self.code in _INTERRUPTED


def run_tool(
    tool: str,
    args: Sequence[object],
    log: Path,
    env: dict[str, str],
    stop: Event,
    watch: Callable[[], None],
    keep_open: int,
) -> Ended:
    """Run a tool of this package.

    Args:
        tool: its file in ``tools``.
        args: of its command line.
        log: file for all that it prints.
        env: its environment.
        stop: set to have it end: by SIGTERM, on which `train.py` saves a checkpoint.
        watch: called twice a second.
        keep_open: a file descriptor that it inherits, whose lock lasts as long as it lives.
    """
    start, peak = time.monotonic(), None
    command = [sys.executable, str(tools_folder() / tool), *map(str, args)]
    with log.open("wb") as file:
        # a session of its own: Ctrl-C comes to the tool alone, which ends its processes in order
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            pass_fds=[keep_open],
            start_new_session=True,
        )
        asked = None
        while not _ends(process):
            peak = _peak_bytes(process.pid) or peak
            if stop.is_set() and asked is None:
                process.terminate()
                asked = time.monotonic()
            if asked is not None and time.monotonic() - asked > _PATIENCE:
                process.kill()
            watch()
    seconds = time.monotonic() - start
    message = "" if process.returncode == 0 else last_words(log.read_text(errors="replace"))
    return Ended(process.returncode, seconds, peak, message)


def _ends(process: subprocess.Popen[bytes]) -> bool:
    """Wait a while for the process; whether it has ended."""
    try:
        process.wait(_POLL)
    except subprocess.TimeoutExpired:
        return False
    return True


def tools_folder() -> Path:
    """The tools, in a source checkout or where a wheel puts them."""
    inside = Path(__file__).parents[2] / ".mim/tools"
    return inside if inside.is_dir() else ROOT / "tools"


def _peak_bytes(pid: int) -> int | None:
    """The peak of a process's resident memory; on Linux."""
    try:
        found = _PEAK.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def last_words(output: str) -> str:
    """The message that a failed tool ended with: from ``error:`` on, else its last line."""
    _, found, message = f"\n{output}".rpartition("\nerror: ")
    lines = [line for line in output.splitlines() if line.strip()]
    if found:
        return message.strip()
    return lines[-1].strip() if lines else "no output"
