from __future__ import annotations

from decimal import Decimal

import pytest

from data_prep.boxes import BoxError, read_boxes

SHARES = [(0.25, 0.25, 0.5, 0.75)]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([[0.25, 0.25, 0.5, 0.75]], SHARES),
        ([0.25, 0.25, 0.5, 0.75], SHARES),
        ([{"left": 0.25, "top": 0.25, "right": 0.5, "bottom": 0.75}], SHARES),
        ({"X_min": 0.25, "Y_min": 0.25, "X_max": 0.5, "Y_max": 0.75}, SHARES),
        ([{"x": 0.25, "y": 0.25, "w": 0.25, "h": 0.5, "score": 0.9}], SHARES),
        ([{"x": 0.25, "y": 0.25, "width": 0.25, "height": 0.5}], SHARES),
        ([{"x1": 0.25, "y1": 0.25, "x2": 0.5, "y2": 0.75}], SHARES),
        ([{"bbox": [0.25, 0.25, 0.5, 0.75], "label": "face"}], SHARES),
        ("[[0.25, 0.25, 0.5, 0.75]]", SHARES),
        ('[{"x": 0.25, "y": 0.25, "w": 0.25, "h": 0.5}]', SHARES),
        ([[1, 2, 3, 4], [0, 0, 40, 50]], [(1, 2, 3, 4), (0, 0, 40, 50)]),
        ([[Decimal("0.25"), 0, 1, 1]], [(0.25, 0, 1, 1)]),
        (None, []),
        ([], []),
        ("", []),
        (" null", []),
        ("[]", []),
    ],
)
def test_boxes_are_read_in_the_layouts_that_people_have(value: object, expected: object) -> None:
    assert read_boxes(value) == expected


@pytest.mark.parametrize(
    "value",
    [
        "left",
        "[[0, 0, 1",
        "7",
        7,
        [[0, 0, 1]],
        [[0, 0, 1, True]],
        [[0.5, 0.5, 0.2, 0.2]],  # x, y, width, height without names
        [{"x": 0, "y": 0, "w": -1, "h": 1}],
        [{"x": 0, "y": 0}],
        [{"left": None, "top": 0, "right": 1, "bottom": 1}],
        [None],
        [[0, 0, float("nan"), 1]],
        [[0, 0, float("inf"), 1]],
        {},
    ],
)
def test_boxes_that_cannot_be_read_are_an_error(value: object) -> None:
    with pytest.raises(BoxError, match="box"):
        read_boxes(value)
