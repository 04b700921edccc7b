"""Scenes hold their promises, and pictures show what the scenes say."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations
from random import Random

import numpy as np
import pytest

from data_prep.synthetic.drawing import RGB, draw, draw_jpeg
from data_prep.synthetic.outlines import OUTLINES
from data_prep.synthetic.scenes import (
    BACKGROUND_CLASHES,
    COLOURS,
    COMBINATIONS,
    SHAPES,
    TEXTURES,
    Scene,
    Thing,
    held_out_combinations,
    sample_scene,
    sample_single,
)

SAMPLES = 3000


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(Random(index), COMBINATIONS) for index in range(SAMPLES)]


@pytest.mark.parametrize("seed", range(20))
def test_held_out_combinations_spare_every_colour_and_shape(seed: int) -> None:
    held_out = held_out_combinations(seed)
    assert len(set(held_out)) == len(held_out) == round(len(COMBINATIONS) / 8)
    assert set(held_out) <= set(COMBINATIONS)
    assert max(Counter(colour for colour, _ in held_out).values()) <= 2
    assert max(Counter(shape for _, shape in held_out).values()) <= 2


def test_held_out_combinations_depend_on_the_seed() -> None:
    assert held_out_combinations(0) == held_out_combinations(0)
    assert held_out_combinations(0) != held_out_combinations(1)


def test_scenes_use_only_the_given_combinations() -> None:
    given = [combination for combination in COMBINATIONS if combination not in held_out_combinations(3)]
    used = {thing.combination for index in range(SAMPLES) for thing in sample_scene(Random(index), given).things}
    assert used == set(given)


def test_scenes_are_of_every_kind_in_fair_shares(scenes: list[Scene]) -> None:
    singles = sum(len(scene.things) == 1 for scene in scenes) / SAMPLES
    related = sum(scene.relation is not None for scene in scenes) / SAMPLES
    assert 0.30 < singles < 0.40
    assert 0.40 < related < 0.50
    assert {len(scene.things) for scene in scenes} == {1, 2, 3, 4, 5}
    assert {scene.relation for scene in scenes} == {None, "left of", "right of", "above", "below", "around"}
    assert {scene.background for scene in scenes} == set(BACKGROUND_CLASHES)
    assert {thing.texture for scene in scenes for thing in scene.things} == set(TEXTURES)


def test_things_lie_inside_the_picture_and_apart(scenes: list[Scene]) -> None:
    for scene in scenes:
        for thing in scene.things:
            reach = thing.radius * 0.9
            assert reach <= thing.x <= 1 - reach
            assert reach <= thing.y <= 1 - reach
        if scene.relation != "around":
            for a, b in combinations(scene.things, 2):
                assert math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius


def test_sizes_mean_the_same_in_every_scene(scenes: list[Scene]) -> None:
    radii = {
        size: [thing.radius for scene in scenes for thing in scene.things if thing.size == size]
        for size in ("small", "large")
    }
    assert max(radii["small"]) < min(radii["large"])


def test_every_shape_can_be_drawn_and_every_colour_painted() -> None:
    assert set(OUTLINES) == set(SHAPES)
    assert set(RGB) == set(COLOURS)
    for outlines in OUTLINES.values():
        assert 0.9 < max(np.abs(outline_N2).max() for outline_N2 in outlines) <= 1.01


def test_colours_are_far_apart() -> None:
    nearest = min(math.dist(RGB[a], RGB[b]) for a, b in combinations(RGB, 2))
    assert nearest > 75


@pytest.mark.parametrize("size", [64, 144])
def test_picture_shows_colour_inside_the_outline_and_not_outside(size: int) -> None:
    """Each combination on some background, against a point-in-polygon test at the pixels' centres."""
    for index, combination in enumerate(COMBINATIONS[:: 1 if size == 64 else 7]):
        scene = sample_single(Random(index), combination)
        thing = Thing(**{**vars(scene.things[0]), "texture": "solid"})
        picture_HWC = np.asarray(draw(Scene((thing,), scene.background, None, index), size), np.float32)
        distance_HW = np.linalg.norm(picture_HWC - RGB[thing.colour], axis=-1)
        # pixels on the edge are blends: judge those whose four corners agree
        corners = [_inside(thing, size, dx, dy) for dx in (-1, 1) for dy in (-1, 1)]
        inside_HW, outside_HW = np.all(corners, axis=0), ~np.any(corners, axis=0)
        assert inside_HW.sum() > 10, combination
        assert (distance_HW[inside_HW] < 60).mean() > 0.97, (combination, scene.background)
        assert (distance_HW[outside_HW] > 60).mean() > 0.97, (combination, scene.background)


def _inside(thing: Thing, size: int, dx: float, dy: float) -> np.ndarray:
    """Even-odd rule by ray casting, for all pixels' centres moved by (dx, dy) pixels."""
    turn = math.radians(thing.angle_deg)
    rows_HW, columns_HW = np.mgrid[0:size, 0:size]
    x_HW = (columns_HW + 0.5 + dx) / size
    y_HW = (rows_HW + 0.5 + dy) / size
    inside_HW = np.zeros((size, size), bool)
    for outline_N2 in OUTLINES[thing.shape]:
        turned = [
            (
                thing.x + thing.radius * (x * math.cos(turn) - y * math.sin(turn)),
                thing.y + thing.radius * (x * math.sin(turn) + y * math.cos(turn)),
            )
            for x, y in outline_N2.tolist()
        ]
        for (ax, ay), (bx, by) in zip(turned, turned[1:] + turned[:1], strict=True):
            if ay != by:
                crosses_HW = (ay > y_HW) != (by > y_HW)
                inside_HW ^= crosses_HW & (x_HW < ax + (y_HW - ay) * (bx - ax) / (by - ay))
    return inside_HW


@pytest.mark.parametrize("texture", TEXTURES)
def test_texture_adds_a_shade_but_keeps_the_colour(texture: str) -> None:
    """A patterned thing shows its colour and a darker shade (of black: a lighter one), a solid thing one alone."""
    for colour in COLOURS:
        scene = sample_single(Random(1), (colour, "square"))
        thing = Thing(**{**vars(scene.things[0]), "texture": texture, "radius": 0.3, "x": 0.5, "y": 0.5})
        picture_HWC = np.asarray(draw(Scene((thing,), "grass", None, 5), 96), np.float32)
        distance_HW = np.linalg.norm(picture_HWC - RGB[colour], axis=-1)
        own_share = (distance_HW[_inside(thing, 96, 0, 0)] < 45).mean()
        if texture == "solid":
            assert own_share > 0.95, colour
        else:
            assert 0.3 < own_share < 0.85, colour


def test_pictures_are_deterministic_and_all_different(scenes: list[Scene]) -> None:
    scene = scenes[0]
    assert draw_jpeg(scene, 48) == draw_jpeg(scene, 48)
    again = Scene(scene.things, scene.background, scene.relation, scene.pixel_seed + 1)
    assert draw_jpeg(again, 48) != draw_jpeg(scene, 48)


@pytest.mark.parametrize("size", [32, 64, 112])
def test_pictures_have_the_size_asked_for(scenes: list[Scene], size: int) -> None:
    for scene in scenes[:60]:
        picture = draw(scene, size)
        assert (picture.size, picture.mode) == ((size, size), "RGB")
