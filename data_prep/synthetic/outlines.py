"""The outlines of the shapes that synthetic pictures are made of.

Each is one polygon, or two where the second is a hole; vertices (x, y) lie within [-1, 1] and y grows downwards.
Arrays carry their axes: N = vertices, 2 = (x, y).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Outline: TypeAlias = npt.NDArray[np.float64]


def _arc(radius: float, start_deg: float, end_deg: float) -> Outline:
    """Points on a circle, about every 6 degrees, clockwise from the top."""
    angles_N = np.radians(np.linspace(start_deg, end_deg, math.ceil((end_deg - start_deg) / 6) + 1))
    return radius * np.stack([np.sin(angles_N), -np.cos(angles_N)], axis=1)


def _polar(corners: Sequence[tuple[float, float]]) -> Outline:
    """Corners given as (radius, degrees clockwise from the top)."""
    return np.concatenate([_arc(radius, angle_deg, angle_deg) for radius, angle_deg in corners])


def _polygon(*corners: tuple[float, float]) -> Outline:
    return np.array(corners)


def _cross(half_width: float) -> Outline:
    arm = [(-half_width, -1.0), (half_width, -1.0), (half_width, -half_width)]
    turned = []
    for _ in range(4):
        turned += arm
        arm = [(-y, x) for x, y in arm]
    return _polygon(*turned)


def _heart() -> Outline:
    t_N = np.radians(np.arange(0, 360, 6))
    up_N = 13 * np.cos(t_N) - 5 * np.cos(2 * t_N) - 2 * np.cos(3 * t_N) - np.cos(4 * t_N)
    return np.stack([16 * np.sin(t_N) ** 3, -up_N - 2.5], axis=1) / 16


def _crescent() -> Outline:
    """The unit circle less a circle of radius 0.8 around (0.45, 0): they meet at (0.625, +-0.78)."""
    outer_N2, inner_N2 = _arc(1, 141.3, 398.7), _arc(0.8, 167.4, 372.6)
    inner_N2[:, 0] += 0.45
    crescent_N2 = np.concatenate([outer_N2, inner_N2[::-1]])
    crescent_N2[:, 0] += 0.18  # into the middle
    return crescent_N2


OUTLINES: dict[str, tuple[Outline, ...]] = {
    "circle": (_arc(1, 0, 360),),
    "square": (_polygon((-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)),),
    "triangle": (_polygon((0, -1), (1, 0.8), (-1, 0.8)),),
    "star": (_polar([corner for k in range(5) for corner in ((1, 72 * k), (0.42, 72 * k + 36))]),),
    "cross": (_cross(half_width=0.32),),
    "ring": (_arc(1, 0, 360), _arc(0.6, 0, 360)),
    "diamond": (_polygon((0, -1), (0.64, 0), (0, 1), (-0.64, 0)),),
    "hexagon": (_polar([(1, 60 * k + 30) for k in range(6)]),),
    "heart": (_heart(),),
    "crescent": (_crescent(),),
}
