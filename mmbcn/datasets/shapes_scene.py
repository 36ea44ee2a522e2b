"""Procedural scenes of textured shapes, where colour does not tell the class.

Every class has its own shape and its own pattern; the colours of all surfaces, the background
included, come from one and the same distribution. A scene is a function of (seed, index, height,
width) alone. On the way to a pixel there are only integers and single IEEE operations on float32
arrays (no array ``sin``, no float filters of OpenCV), which round alike on every machine.
"""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import cv2
import numpy as np
from numpy.typing import NDArray

from mmbcn.errors import UsageError

CLASSES = ("background", "disc", "square", "triangle", "ring", "cross", "star")
PALETTE = [
    [0, 0, 0],
    [230, 60, 60],
    [60, 180, 75],
    [65, 105, 225],
    [245, 190, 40],
    [145, 60, 190],
    [70, 215, 225],
]
MIN_SIDE = 16

# Difficulty. Lengths are in units of the shorter side of the image, colours run from 0 to 1.
NUM_OBJECTS = (3, 5)  # fewest and most objects in a scene
RADIUS = (0.16, 0.3)  # of the circle around an object: 20 to 38 pixels at 128x128
SPACING = 0.7  # wanted distance of two centres over the sum of their radii; less: more occlusion
INSET = 0.4  # an object's centre is this many of its radii inside the image, or more
PLACE_TRIES = 8  # positions to choose from; more: SPACING is kept more often
COLOR_TRIES = 10  # colours to choose from; more: the surfaces of a scene differ more
COLOR = (0.15, 0.85)  # range of a surface's mean colour, per channel
PATTERN_CONTRAST = (0.35, 0.55)  # difference of a pattern's two colours, per channel
PERIOD_SPREAD = (0.85, 1.15)  # of a pattern's period, around its class's
GAIN = (0.7, 1.2)  # brightness of the light
TINT = 0.1  # largest relative change of the light's colour, per channel
SHADING = 0.25  # largest relative change of the light from the centre to a border
NOISE = 0.03  # standard deviation of the noise, per pixel and channel

Image = NDArray[np.uint8]
Array = NDArray[np.float32]
Mask = NDArray[np.bool_]

_TRIANGLE = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in (90, 210, 330)]
_STAR = [(math.cos(math.radians(a)), math.sin(math.radians(a))) for a in range(18, 378, 72)]


def _half_planes(u: Array, v: Array, normals: list[tuple[float, float]], offset: float) -> Array:
    """In how many of the half-planes ``normal . (u, v) <= offset`` each point lies."""
    return sum(((a * u + b * v) <= offset).astype(np.uint8) for a, b in normals)


# Inside or outside, in the object's own frame; the circle around the object has radius 1.
SHAPES: dict[str, Callable[[Array, Array], Mask]] = {
    "disc": lambda u, v: u * u + v * v <= 0.9**2,
    "square": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.76,
    "triangle": lambda u, v: _half_planes(u, v, _TRIANGLE, 0.5) == 3,
    "ring": lambda u, v: abs(u * u + v * v - 0.62) <= 0.3,
    "cross": lambda u, v: (
        (np.minimum(abs(u), abs(v)) <= 0.27) & (np.maximum(abs(u), abs(v)) <= 0.95)
    ),
    "star": lambda u, v: _half_planes(u, v, _STAR, math.cos(math.radians(72))) >= 4,
}


def check_scene(seed: int, size: Sequence[int]) -> None:
    """Raise UsageError unless scenes of this seed and this (height, width) can be drawn."""
    if not isinstance(seed, Integral) or seed < 0:
        raise UsageError(f"seed must be an integer of 0 or more, got {seed!r}")
    pair = isinstance(size, Sequence) and len(size) == 2
    if not pair or not all(isinstance(n, Integral) and n >= MIN_SIDE for n in size):
        raise UsageError(
            f"size must be (height, width), two integers of {MIN_SIDE} or more, got {size!r}; "
            "128x128 is a good start"
        )


def draw_scene(seed: int, index: int, height: int, width: int) -> tuple[Image, Image]:
    """Draw scene ``index`` of the set ``seed``.

    Returns:
        The image (height, width, 3), BGR, and the label (height, width) of class indices.
    """
    rng = np.random.default_rng((seed, index))
    side = min(height, width)
    radii = rng.uniform(*RADIUS, rng.integers(NUM_OBJECTS[0], NUM_OBJECTS[1] + 1)) * side
    centers = _place(rng, radii, height, width)
    labels = rng.integers(1, len(CLASSES), len(radii))
    angles = rng.uniform(0, 2 * math.pi, len(radii))
    colors = _colors(rng, len(radii) + 1)

    image = _surface(rng, height, width, side, colors[0], "background")
    label = np.zeros((height, width), np.uint8)
    for (cx, cy), radius, k, angle, color in zip(
        centers, radii, labels, angles, colors[1:], strict=True
    ):
        left, right = max(int(cx - radius), 0), min(int(cx + radius) + 2, width)
        top, bottom = max(int(cy - radius), 0), min(int(cy + radius) + 2, height)
        x = (np.arange(left, right, dtype=np.float32) - float(cx)) / float(radius)
        y = (np.arange(top, bottom, dtype=np.float32)[:, None] - float(cy)) / float(radius)
        cos, sin = math.cos(angle), math.sin(angle)
        mask = SHAPES[CLASSES[k]](cos * x + sin * y, cos * y - sin * x)
        box = np.s_[top:bottom, left:right]
        surface = _surface(rng, bottom - top, right - left, side, color, CLASSES[k])
        np.copyto(image[box], surface, where=mask[..., None])
        label[box][mask] = k
    return _photograph(rng, image), label


def _place(
    rng: np.random.Generator, radii: NDArray[np.float64], height: int, width: int
) -> NDArray[np.float64]:
    """Centres (x, y): of some random positions the first that keeps SPACING, else the best."""
    centers = np.empty((len(radii), 2))
    for i, radius in enumerate(radii):
        inset = INSET * radius
        tries = rng.uniform(inset, (width - inset, height - inset), (PLACE_TRIES, 2))
        apart = np.sqrt(((tries[:, None] - centers[:i]) ** 2).sum(-1)) / (radii[:i] + radius)
        centers[i] = tries[np.minimum(apart.min(1, initial=SPACING), SPACING).argmax()]
    return centers


def _colors(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Colours unlike one another. Shuffled: which surface gets which tells nothing."""
    colors = np.empty((count, 3))
    for i in range(count):
        tries = rng.uniform(*COLOR, (COLOR_TRIES, 3))
        apart = ((tries[:, None] - colors[:i]) ** 2).sum(-1)
        colors[i] = tries[apart.min(1, initial=3.0).argmax()]
    return rng.permutation(colors)


def _surface(
    rng: np.random.Generator,
    height: int,
    width: int,
    side: int,
    color: NDArray[np.float64],
    name: str,
) -> Array:
    """A surface of the given mean colour with the pattern of its class: (height, width, 3)."""
    pattern, period = PATTERNS[name]
    strength = pattern(rng, height, width, rng.uniform(*PERIOD_SPREAD) * period * side)
    change = rng.uniform(*PATTERN_CONTRAST, 3) * rng.choice((-1, 1))
    low, step = (color - change / 2).astype(np.float32), change.astype(np.float32)
    return strength[..., None] * step + low


def _flat(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    return np.full((height, width), 0.5, np.float32)


def _stripes(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    bars = _bars(height, width, period, rng.uniform(0, math.pi), rng.random())
    return bars.astype(np.float32)


def _checks(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    angle, *phases = rng.random(3)
    angle *= math.pi
    bars = _bars(height, width, period, angle, phases[0])
    bars ^= _bars(height, width, period, angle + math.pi / 2, phases[1])
    return bars.astype(np.float32)


def _blobs(rng: np.random.Generator, height: int, width: int, period: float) -> Array:
    """Smooth clouds: a coarse random grid, enlarged in fixed-point arithmetic."""
    cells = max(round(height / period), 1) + 1, max(round(width / period), 1) + 1
    coarse = rng.integers(0, 256, cells, np.uint8)
    fine = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    return fine.astype(np.float32) / np.float32(255)


def _bars(height: int, width: int, period: float, angle: float, phase: float) -> Mask:
    """Parallel bars, true and false in turn."""
    x = np.arange(width, dtype=np.float32) * (math.cos(angle) / period) + float(phase)
    y = np.arange(height, dtype=np.float32) * (math.sin(angle) / period)
    turns = x + y[:, None]
    return turns - np.floor(turns) < 0.5


# The pattern of each class, and its period; a pattern says how much of the second colour, 0 to 1.
PATTERNS: dict[str, tuple[Callable[..., Array], float]] = {
    "background": (_blobs, 0.4),
    "disc": (_flat, 1.0),
    "square": (_stripes, 0.05),
    "triangle": (_checks, 0.06),
    "ring": (_stripes, 0.14),
    "cross": (_checks, 0.2),
    "star": (_blobs, 0.07),
}


def _photograph(rng: np.random.Generator, image: Array) -> Image:
    """Light the scene (gain, tint, shading) and add the noise of a camera."""
    height, width = image.shape[:2]
    slope = rng.uniform(-SHADING, SHADING, 2)
    x = np.linspace(-slope[0], slope[0], width).astype(np.float32)
    y = np.linspace(-slope[1], slope[1], height).astype(np.float32)
    light = rng.uniform(*GAIN) * rng.uniform(1 - TINT, 1 + TINT, 3) * 255
    image = image * (1 + x + y[:, None])[..., None] * light.astype(np.float32)
    # The sum of two bytes has a triangular distribution of standard deviation 256 / sqrt(6).
    noise = rng.integers(0, 256, (2, *image.shape), np.uint8).astype(np.float32)
    image += (noise[0] + noise[1] - 255) * (NOISE * math.sqrt(6) * 255 / 256)
    return np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)
