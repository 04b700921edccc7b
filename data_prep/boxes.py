"""Boxes to blur, in the layouts in which people have them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias

Boxes: TypeAlias = Sequence[Sequence[float]]

_CORNER_NAMES = (("left", "top", "right", "bottom"), ("x1", "y1", "x2", "y2"), ("x0", "y0", "x1", "y1"),
                 ("xmin", "ymin", "xmax", "ymax"))  # fmt: skip
_SIZE_NAMES = (("x", "y", "w", "h"), ("x", "y", "width", "height"), ("left", "top", "width", "height"))
_WHOLE_NAMES = frozenset({"bbox", "box", "boundingbox"})


class BoxError(ValueError):
    """A value that says no boxes: an unblurred face is worse than no picture."""


def read_boxes(value: Any) -> Boxes:
    """Boxes as (left, top, right, bottom), in shares of width and height or in pixels.

    A list of [left, top, right, bottom], of objects with these names (also x1, xmin, …; x, y, width, height; one inside
    `bbox`), a single one of either, or any of that as JSON text. Null and nothing are no boxes.

    Raises BoxError for everything else: an unblurred face is worse than no picture.
    """
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise BoxError(f"boxes to blur are no JSON: {str(value)[:80]}") from error
    if value is None:
        return []
    is_single = isinstance(value, Mapping) or (isinstance(value, list) and value and _is_number(value[0]))
    boxes = [value] if is_single else value
    if not isinstance(boxes, list):
        raise BoxError(f"not boxes to blur: {str(value)[:80]}")
    try:
        return [_corners(box) for box in boxes]
    except (OverflowError, RecursionError) as error:
        raise BoxError(f"not boxes to blur: {str(value)[:80]}") from error


def _corners(box: Any) -> tuple[float, float, float, float]:
    if isinstance(box, Mapping):
        named = {str(name).lower().replace("_", ""): number for name, number in box.items()}
        for whole in _WHOLE_NAMES.intersection(named):
            return _corners(named[whole])
        sides = next(([named[n] for n in names] for names in _CORNER_NAMES if named.keys() >= set(names)), None)
        if sides is None:
            sides = next(([named[n] for n in names] for names in _SIZE_NAMES if named.keys() >= set(names)), [])
            if len(sides) == 4 and all(map(_is_number, sides)):
                sides = [sides[0], sides[1], sides[0] + sides[2], sides[1] + sides[3]]
        box = sides
    if not isinstance(box, Sequence) or len(box) != 4 or not all(map(_is_number, box)):
        raise BoxError(f"a box to blur is not [left, top, right, bottom]: {str(box)[:80]}")
    left, top, right, bottom = map(float, box)
    if not (math.isfinite(left + top + right + bottom) and left <= right and top <= bottom):
        raise BoxError(f"a box to blur is not [left, top, right, bottom]: {str(list(box))[:80]}")
    return left, top, right, bottom


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)
