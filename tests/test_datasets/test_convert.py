import os
import signal
import time
from multiprocessing import Process
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg.datasets", exc_type=ImportError)

from mmbcn.datasets.parallel import run_parallel
from mmbcn.datasets.prepare.convert import Job, convert, is_finished, read_label, write_file
from mmbcn.errors import UsageError


def double(number):
    return 2 * number


def fail_at_3(number):
    if number == 3:
        raise OSError("number 3")
    return number


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_run_parallel_keeps_the_order(workers, count):
    assert list(run_parallel(double, range(count), workers, "test")) == list(range(0, 2 * count, 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_run_parallel_passes_errors_on(workers):
    with pytest.raises(OSError, match="number 3"):
        list(run_parallel(fail_at_3, range(9), workers, "test"))


def test_run_parallel_ends_when_a_worker_is_killed():
    with pytest.raises(RuntimeError, match="terminated abruptly"):
        list(run_parallel(die, range(4), 2, "test"))


def test_run_parallel_refuses_no_worker():
    with pytest.raises(UsageError, match="workers must be 1 or more, got 0"):
        list(run_parallel(double, [1], 0, "test"))


def make(path: Path) -> np.ndarray:
    """A label of the value that the file is named by."""
    if path.stem == "bad":
        raise UsageError("it is bad")
    return np.full((4, 6), int(path.stem), np.uint8)


def jobs(root, *names):
    return [Job(Path(f"/from/{name}.x"), root / f"to/{name}.png") for name in names]


@pytest.mark.parametrize("workers", [1, 2])
def test_convert_writes_what_is_not_finished(tmp_path, workers):
    assert convert(make, jobs(tmp_path, 1, 2), workers, "t") == (2, 0, [])
    whole = (tmp_path / "to/1.png").read_bytes()
    (tmp_path / "to/1.png").write_bytes(whole[:-1])  # as another tool may leave it
    (tmp_path / "to/2.png").write_bytes(cv2.imencode(".png", make(Path("7")))[1].tobytes())
    assert convert(make, jobs(tmp_path, 1, 2, 3), workers, "t") == (2, 1, [])
    values = [np.unique(cv2.imread(str(tmp_path / f"to/{n}.png"), -1)) for n in (1, 2, 3)]
    assert values == [1, 7, 3]  # 2 was finished: it is left as it is


def test_convert_goes_on_after_a_failure_and_names_it(tmp_path):
    summary = convert(make, jobs(tmp_path, 1, "bad", 2), 1, "t")
    assert summary == (2, 0, ["/from/bad.x: it is bad"])
    assert sorted(path.name for path in (tmp_path / "to").iterdir()) == ["1.png", "2.png"]
    assert str(summary) == "2 written, 0 there already, 1 failed"
    with pytest.raises(UsageError, match=r"1 files could not be made.*\n  /from/bad.x: it is bad$"):
        summary.check()


def write_for_ever(path, size):
    data = bytes(size)
    while True:
        write_file(path, data)
        path.unlink()


def test_a_killed_process_leaves_no_half_written_file(tmp_path):
    target = tmp_path / "label.png"
    for delay in (0.02, 0.03, 0.05, 0.08):
        child = Process(target=write_for_ever, args=(target, 20_000_000))
        child.start()
        time.sleep(delay)
        child.kill()
        child.join()
        assert not target.exists() or target.stat().st_size == 20_000_000
        assert {path.name for path in tmp_path.iterdir()} <= {target.name, f"{target.name}.partial"}
    write_file(target, b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_is_finished_sees_a_missing_end(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    assert not is_finished(path)
    Image.new("L", (9, 9)).save(path)
    assert is_finished(path)
    data = path.read_bytes()
    for length in (0, 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert not is_finished(path)


def test_read_label_keeps_palette_indices_and_refuses_colours(tmp_path):
    index = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_label(tmp_path / "p.png"), index)
    image.convert("RGB").save(tmp_path / "rgb.png")
    with pytest.raises(UsageError, match=r"expected a label map.* mode RGB"):
        read_label(tmp_path / "rgb.png")
