"""Drawing a scene: antialiased outlines filled with a texture, over a background, under uneven light.

Arrays carry their axes: H, W = pixel rows and columns, C = RGB from 0 to 255, N = vertices, 2 = (x, y).
"""

from __future__ import annotations

import io
import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from data_prep.synthetic.backgrounds import paint_background
from data_prep.synthetic.outlines import OUTLINES
from data_prep.synthetic.scenes import Scene, Thing

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Box: TypeAlias = tuple[int, int, int, int]  # left, top, right, bottom in pixels

RGB = {
    "red": (222, 32, 38),
    "orange": (250, 132, 20),
    "yellow": (250, 222, 40),
    "green": (36, 152, 60),
    "cyan": (44, 208, 218),
    "blue": (34, 74, 214),
    "purple": (128, 44, 168),
    "pink": (250, 128, 190),
    "white": (248, 248, 248),
    "black": (16, 16, 18),
}
# the second colour of a texture is a shade of the first, so that a thing keeps one colour name
_SHADE = 0.52
_SHADE_OF_BLACK = (112, 112, 116)
_TEXTURE_PERIOD = 0.095  # of the picture's side, whatever the thing's size: visible on small things too

_SUPERSAMPLING = 4
_COLOUR_JITTER = 10.0
_LIGHT_SLOPE = 0.14
_NOISE_SIGMA = 3.5
_JPEG_QUALITY = 92


def draw_jpeg(scene: Scene, size: int) -> bytes:
    """Draw `scene` as a square JPEG of `size` pixels, without chroma subsampling: edges of small things stay clean."""
    buffer = io.BytesIO()
    draw(scene, size).save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def draw(scene: Scene, size: int) -> Image.Image:
    """Draw `scene` as a square RGB picture of `size` pixels; the same scene gives the same pixels."""
    random = np.random.default_rng(scene.pixel_seed)
    canvas_HWC = paint_background(scene.background, size, random)
    for thing in scene.things:
        _paint_thing(canvas_HWC, thing, random)
    _light(canvas_HWC, random)
    return Image.fromarray(np.clip(canvas_HWC, 0, 255).astype(np.uint8))


def _paint_thing(canvas_HWC: Array, thing: Thing, random: np.random.Generator) -> None:
    size = len(canvas_HWC)
    reach = math.ceil(thing.radius * size * 1.25) + 1  # corners of a turned square stick out
    left, top = round(thing.x * size) - reach, round(thing.y * size) - reach
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + 2 * reach, size), min(top + 2 * reach, size)

    jitter_C = random.uniform(-_COLOUR_JITTER, _COLOUR_JITTER, 3)
    colour_C: Array = (RGB[thing.colour] + jitter_C).astype(np.float32)
    fill_HWC = colour_C
    if thing.texture != "solid":
        shade_C = np.array(_SHADE_OF_BLACK, np.float32) if thing.colour == "black" else _SHADE * colour_C
        u_HW, v_HW = _coordinates(thing, size, (x0, y0, x1, y1))
        fill_HWC = colour_C + _pattern(thing.texture, u_HW, v_HW, size)[..., None] * (shade_C - colour_C)
    region_HWC = canvas_HWC[y0:y1, x0:x1]
    region_HWC += _coverage(thing, size, (x0, y0, x1, y1))[..., None] * (fill_HWC - region_HWC)


def _coordinates(thing: Thing, size: int, box: Box) -> tuple[Array, Array]:
    """The pixels of `box` in the thing's own turned frame, in units of the picture's side from its centre."""
    x0, y0, x1, y1 = box
    turn = math.radians(thing.angle_deg)
    across_W = (np.arange(x0, x1, dtype=np.float32) + 0.5) / size - thing.x
    down_H1 = ((np.arange(y0, y1, dtype=np.float32) + 0.5) / size - thing.y)[:, None]
    u_HW = across_W * math.cos(turn) + down_H1 * math.sin(turn)
    v_HW = down_H1 * math.cos(turn) - across_W * math.sin(turn)
    return u_HW, v_HW


def _coverage(thing: Thing, size: int, box: Box) -> Array:
    """How much of each pixel in `box` the thing's outline covers, 0 to 1."""
    x0, y0, x1, y1 = box
    mask = Image.new("L", ((x1 - x0) * _SUPERSAMPLING, (y1 - y0) * _SUPERSAMPLING))
    pen = ImageDraw.Draw(mask)
    turn = math.radians(thing.angle_deg)
    rotation = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    centre = np.array([thing.x * size - x0, thing.y * size - y0])
    for depth, outline_N2 in enumerate(OUTLINES[thing.shape]):
        points_N2 = (outline_N2 @ rotation * (thing.radius * size) + centre) * _SUPERSAMPLING
        pen.polygon(points_N2.ravel().tolist(), fill=0 if depth % 2 else 255)
    return np.asarray(mask.reduce(_SUPERSAMPLING), np.float32) / 255


def _pattern(texture: str, u_HW: Array, v_HW: Array, size: int) -> Array:
    """The share of each pixel in the texture's second colour, 0 to 1, with edges about one pixel wide."""
    frequency = 2 * math.pi / _TEXTURE_PERIOD
    if texture == "striped":
        wave_HW = np.sin(frequency * u_HW)
    elif texture == "dotted":
        wave_HW = np.sin(frequency * u_HW) + np.sin(frequency * v_HW) - 0.55
    else:
        frequency /= 1.5  # checks of a stripe's width would be lost on small things
        wave_HW = 1.5 * np.sin(frequency * u_HW) * np.sin(frequency * v_HW)
    share_HW: Array = np.clip(0.5 + wave_HW * (size / frequency), 0, 1)
    return share_HW


def _light(canvas_HWC: Array, random: np.random.Generator) -> None:
    """Light that falls off in a random direction, and sensor noise: no two pictures share their pixels."""
    size = len(canvas_HWC)
    slope_x, slope_y = random.uniform(-_LIGHT_SLOPE, _LIGHT_SLOPE, 2).astype(np.float32)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    canvas_HWC *= (1 + slope_y * ramp[:, None] + slope_x * ramp)[..., None]
    canvas_HWC += random.standard_normal(canvas_HWC.shape, dtype=np.float32) * _NOISE_SIGMA
