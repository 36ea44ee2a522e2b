"""Reads and writes videos, a frame at a time, with OpenCV."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from mmbcn.errors import UsageError
from mmbcn.inference.predictor import UnreadableError

_USUAL_FPS = 25.0  # where the file does not say
_COUNTED = (".mp4", ".m4v", ".mov", ".avi")  # the others tell a duration, which sound may prolong


def expected_frames(path: Path) -> int:
    """The least number of frames that a whole file gives: what it says, where it counts them."""
    return max(count_frames(path), 1) if path.suffix.lower() in _COUNTED else 1


def count_frames(path: Path) -> int:
    """The number of frames that a video says it has; 0: it cannot be read, or does not say."""
    video = cv2.VideoCapture(str(path))
    count = int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0
    video.release()
    return max(count, 0)


class VideoReader:
    """The frames (H, W, 3) of a video, BGR, turned as the file says.

    Args:
        path: of the file.

    Attributes:
        fps: frames per second.

    Raises:
        UnreadableError: it is no video that OpenCV can read.
    """

    def __init__(self, path: Path) -> None:
        self._video = cv2.VideoCapture(str(path))
        if not self._video.isOpened():
            raise UnreadableError("no video that OpenCV can read")
        fps = self._video.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else _USUAL_FPS

    def __iter__(self) -> Iterator[NDArray[np.uint8]]:
        """The frames."""
        try:
            while True:
                there, frame = self._video.read()
                if not there:
                    return
                yield frame
        finally:
            self._video.release()


class VideoWriter:
    """Writes frames (H, W, 3), BGR, all of one size, as MPEG-4.

    Args:
        path: ends in ``.mp4``.
        fps: frames per second.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._path, self._fps = path, fps
        self._writer: cv2.VideoWriter | None = None

    def write(self, frame: NDArray[np.uint8]) -> None:
        """Add a frame.

        Raises:
            UsageError: OpenCV cannot write the file.
        """
        if self._writer is None:
            code = cv2.VideoWriter_fourcc(*"mp4v")
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self._path), code, self._fps, size)
        if not self._writer.isOpened():
            raise UsageError(f"OpenCV cannot write the video {self._path}")
        self._writer.write(frame)

    def close(self) -> None:
        """Complete the file."""
        if self._writer is not None:
            self._writer.release()
