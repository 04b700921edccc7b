"""Backgrounds of synthetic pictures: plain ones, patterned ones, and scenery.

All are muted, so that the saturated things on them are easy to see. Arrays carry their axes: H, W = pixel rows and
columns, C = RGB from 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Random: TypeAlias = np.random.Generator
Colour: TypeAlias = npt.NDArray[np.floating[Any]]  # [3]

_LIGHTNESS = {"light": (175.0, 212.0), "dark": (62.0, 92.0)}
_TINT = 10.0  # how far from grey


def paint_background(name: str, size: int, random: Random) -> Array:
    """Paint the background called `name` (a key of `scenes.BACKGROUND_CLASHES`) as [size, size, 3] floats."""
    if name in _SCENERY:
        return _SCENERY[name](size, random)
    tone, pattern = name.split()
    base_C = random.uniform(*_LIGHTNESS[tone]) + random.uniform(-_TINT, _TINT, 3)
    other_C = base_C + random.choice([-1, 1]) * random.uniform(22, 34) + random.uniform(-_TINT, _TINT, 3)
    return _PATTERNS[pattern](size, base_C.astype(np.float32), other_C.astype(np.float32), random)


def _blend(share_HW: Array, base_C: Colour, other_C: Colour) -> Array:
    canvas_HWC: Array = base_C + share_HW[..., None] * (other_C - base_C)
    return canvas_HWC


def _noise(size: int, cells_x: int, cells_y: int, random: Random) -> Array:
    """Value noise in [0, 1], [size, size]: random values on a coarse grid, smoothly interpolated."""
    grid = Image.fromarray(random.random((cells_y, cells_x), dtype=np.float32))
    smooth = grid.resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(smooth, np.float32), 0, 1)


def _ramp(size: int, angle: float) -> Array:
    """Position along the direction `angle` (radians), [size, size], in units of the side, 0 in the centre."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    return np.asarray(axis * math.cos(angle) + axis[:, None] * math.sin(angle), np.float32)


def _plain(size: int, base_C: Colour, other_C: Colour, random: Random) -> Array:
    return np.full((size, size, 3), base_C, np.float32)


def _shaded(size: int, base_C: Colour, other_C: Colour, random: Random) -> Array:
    ramp_HW = _ramp(size, random.uniform(0, 2 * math.pi))
    return _blend(0.5 + 1.2 * ramp_HW, base_C, other_C)


def _striped(size: int, base_C: Colour, other_C: Colour, random: Random) -> Array:
    period = random.uniform(0.16, 0.28)
    wave_HW = np.sin(_ramp(size, random.uniform(0, math.pi)) * np.float32(2 * math.pi / period))
    sharpness = size * period / (2 * math.pi)  # edges about one pixel wide
    return _blend(np.clip(0.5 + sharpness * wave_HW, 0, 1), base_C, other_C)


def _mottled(size: int, base_C: Colour, other_C: Colour, random: Random) -> Array:
    share_HW = 0.65 * _noise(size, 5, 5, random) + 0.35 * _noise(size, 14, 14, random)
    return _blend(np.clip(2.2 * share_HW - 0.6, 0, 1), base_C, other_C)


def _cluttered(size: int, base_C: Colour, other_C: Colour, random: Random) -> Array:
    """Overlapping soft ellipses in several muted tones."""
    scale = 2  # supersampling
    layer = Image.new("RGB", (size * scale, size * scale), _rgb(base_C))
    pen = ImageDraw.Draw(layer)
    for x, y, width, height, share in random.random((14, 5)) * size * scale:
        tone_C = base_C + (other_C - base_C) * (2.2 * share / (size * scale) - 0.6)
        w, h = 0.06 * size * scale + 0.16 * width, 0.06 * size * scale + 0.16 * height
        pen.ellipse((x - w, y - h, x + w, y + h), fill=_rgb(tone_C + random.uniform(-12, 12, 3)))
    return np.array(layer.reduce(scale), np.float32)


def _rgb(colour_C: Colour) -> tuple[int, int, int]:
    red, green, blue = np.clip(colour_C, 0, 255).astype(int).tolist()
    return red, green, blue


def _grass(size: int, random: Random) -> Array:
    blades_HW = 0.6 * _noise(size, 32, 7, random) + 0.4 * _noise(size, 12, 4, random)
    depth_HW = _ramp(size, math.pi / 2)  # nearer, so brighter, towards the bottom
    share_HW = np.clip(1.8 * blades_HW - 0.4 + 0.3 * depth_HW, 0, 1)
    return _blend(share_HW, _jittered(62, 88, 46, random), _jittered(128, 150, 84, random))


def _sky(size: int, random: Random) -> Array:
    height_HW = 0.5 - _ramp(size, math.pi / 2)
    canvas_HWC = _blend(height_HW, _jittered(176, 202, 222, random), _jittered(112, 156, 206, random))
    clouds_HW = np.clip(2.4 * (0.6 * _noise(size, 4, 6, random) + 0.4 * _noise(size, 9, 13, random)) - 1.15, 0, 0.8)
    canvas_HWC += clouds_HW[..., None] * (np.float32(238) - canvas_HWC)
    return canvas_HWC


def _bricks(size: int, random: Random) -> Array:
    """Courses of bricks, each brick in its own tone, with pale mortar between them."""
    courses, per_course = 8, 4
    offset_x, offset_y = random.random(2)
    axis = (np.arange(size) + 0.5) / size
    row_H, in_row_H = np.divmod(axis * courses + offset_y, 1)
    column_HW, in_column_HW = np.divmod(axis * per_course + offset_x + 0.5 * (row_H[:, None] % 2), 1)
    tones = random.uniform(0, 1, (courses + 1, per_course + 2)).astype(np.float32)
    tone_HW = tones[row_H[:, None].astype(int), column_HW.astype(int)]
    mortar_HW = (in_row_H[:, None] < 0.14) | (in_column_HW < 0.07)
    canvas_HWC = _blend(tone_HW, _jittered(122, 84, 70, random), _jittered(156, 112, 94, random))
    canvas_HWC[mortar_HW] = _jittered(182, 174, 164, random)
    return canvas_HWC


def _jittered(red: float, green: float, blue: float, random: Random) -> Colour:
    return (np.array([red, green, blue]) + random.uniform(-8, 8) + random.uniform(-5, 5, 3)).astype(np.float32)


_PATTERNS: dict[str, Callable[[int, Colour, Colour, Random], Array]] = {
    "plain": _plain,
    "shaded": _shaded,
    "striped": _striped,
    "mottled": _mottled,
    "cluttered": _cluttered,
}
_SCENERY: dict[str, Callable[[int, Random], Array]] = {"grass": _grass, "sky": _sky, "bricks": _bricks}
