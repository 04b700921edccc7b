"""Fields of other libraries' configuration files, read by allow-list: what is not understood is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

# What reading a file of settings that somebody else wrote may raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError)


def refuse_others(
    where: str, fields: Mapping[str, Any], read: Collection[str], fixed: Mapping[str, Any], ignored: Collection[str]
) -> None:
    """Raise ValueError for a field that is neither `read`, nor `ignored`, nor has its `fixed` value, nor is off."""
    for name, value in fields.items():
        is_off = value is None or value is False or value == {}
        if not (name in read or name in ignored or is_off or (name in fixed and value == fixed[name])):
            raise ValueError(f"{where} has {name} {value}, which models here do not have")


def with_defaults(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `defaults`, with the values that are given and not null."""
    return {name: default if fields.get(name) is None else fields[name] for name, default in defaults.items()}


def square(name: str, value: Any) -> int:
    """A side in pixels from a number, or from a list or a "height" and "width" that are equal; ValueError otherwise."""
    sides = value
    if isinstance(value, Mapping):
        sides = [value["height"], value["width"]] if value.keys() == {"height", "width"} else []
    sides = set(sides) if isinstance(sides, list) else {sides}
    if len(sides) != 1 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"{name} is {value}, not the side of a square in pixels")
    side: int = sides.pop()
    return side


def per_channel(name: str, value: Any, positive: bool = False) -> tuple[float, float, float]:
    """Three finite numbers, or one for all channels; ValueError otherwise."""
    values = value if isinstance(value, list) else [value] * 3
    known = all(isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in values)
    if len(values) != 3 or not known or (positive and min(values) <= 0):
        raise ValueError(f"{name} is {value}, not a{' positive' if positive else ''} number for each channel")
    return tuple(float(x) for x in values)  # type: ignore[return-value]
