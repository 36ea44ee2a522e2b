"""The loop of docs/plain_pytorch.md, as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCKED = "import sys\nfor name in ('mmengine', 'mmcv', 'mmseg'): sys.modules[name] = None\n"


def test_training_loop_of_the_docs_learns(tmp_path):
    text = (ROOT / "docs/plain_pytorch.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-c", BLOCKED + block]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(re.fullmatch(r"pixels right: (\d\.\d+)\n", done.stdout)[1]) > 0.95
    assert (tmp_path / "model.pth").is_file()
