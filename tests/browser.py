"""A page in a headless Chromium: what it shows, complains of and asks the network for."""

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_QUIET = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # nothing leaves the machine
    "--hide-scrollbars",
    "--enable-logging=stderr",
)


@dataclass
class Shown:
    """A page after it was loaded.

    Attributes:
        dom: the document, as HTML.
        picture: file of a screenshot.
        complaints: lines of the console.
        requests: addresses that it asked the network for.
    """

    dom: str
    picture: Path
    complaints: list[str]
    requests: list[str]


def show(page: Path, folder: Path, height: int) -> Shown:
    """Load a page; skips the test where there is no Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium")
    log, picture = folder / "net.json", folder / "page.png"
    command = [chromium, *_QUIET, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    size = f"--window-size=1280,{height}"
    calls = ["--dump-dom"], [f"--screenshot={picture}", size]
    outputs = [
        subprocess.run([*command, *call, page.as_uri()], capture_output=True, text=True, timeout=90)
        for call in calls
    ]
    complaints = [line for out in outputs for line in out.stderr.splitlines() if "CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "initiator" in event.get("params", {})]
    requests = [a["url"] for a in asked if a["initiator"] != "not an origin"]  # the browser's own
    return Shown(outputs[0].stdout, picture, complaints, requests)
