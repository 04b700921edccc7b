"""Captions are true, fluent, varied; hard negatives are false and betray nothing in their words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from random import Random

import pytest
from caption_parser import RELATIONS, is_true, parse

from data_prep.synthetic.grammar import caption
from data_prep.synthetic.hard_negatives import KINDS, sample_contrast
from data_prep.synthetic.scenes import (
    BACKGROUND_CLASHES,
    COMBINATIONS,
    Combination,
    Scene,
    held_out_combinations,
    sample_scene,
)

SAMPLES = 4000
CONTRASTS = 1500


@pytest.fixture(scope="module")
def captioned() -> list[tuple[Scene, str]]:
    scenes = [sample_scene(Random(index), COMBINATIONS) for index in range(SAMPLES)]
    return [(scene, caption(scene, scene.pixel_seed)) for scene in scenes]


@pytest.fixture(scope="module")
def seen() -> list[Combination]:
    held_out = held_out_combinations(0)
    return [combination for combination in COMBINATIONS if combination not in held_out]


@pytest.fixture(scope="module", params=KINDS)
def contrasts(request: pytest.FixtureRequest, seen: list[Combination]) -> tuple[str, list[tuple[Scene, str, str]]]:
    rows = []
    for index in range(CONTRASTS):
        shown, other = sample_contrast(Random(f"{request.param} {index}"), request.param, seen)
        rows.append((shown, caption(shown, index), caption(other, index)))
    return request.param, rows


def test_captions_are_true_of_their_scenes(captioned: list[tuple[Scene, str]]) -> None:
    for scene, text in captioned:
        assert is_true(text, scene), (text, scene)


def test_captions_are_false_of_other_scenes(captioned: list[tuple[Scene, str]]) -> None:
    """The judge of the other tests can say no: neighbours in the list seldom show the same."""
    wrong = 0
    for (_, text), (scene, _) in pairwise(captioned):
        wrong += len(parse(text).named) == len(scene.things) and is_true(text, scene)
    assert wrong < 0.01 * SAMPLES


def test_every_thing_is_named_with_colour_and_shape(captioned: list[tuple[Scene, str]]) -> None:
    for scene, text in captioned:
        assert sorted({item.combination for item in parse(text).named}) == sorted(
            {thing.combination for thing in scene.things}
        )


def test_captions_are_fluent(captioned: list[tuple[Scene, str]]) -> None:
    for _, text in captioned:
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $|,,| ,|[\t\n]", text), text
        assert len(text.split()) <= 40
        assert "there are" not in text or re.search(r"there are (two|three|four|five)", text), text


def test_paraphrases_cover_the_grammar(captioned: list[tuple[Scene, str]]) -> None:
    skeletons = Counter(parse(text).skeleton for _, text in captioned)
    assert set(skeletons) == {"X", "a group of X", "X, Y and Z", *RELATIONS}
    assert {parse(text).pattern for _, text in captioned} >= {name.split()[-1] for name in BACKGROUND_CLASHES}
    words = {word for _, text in captioned for word in re.findall(r"\w+", text)}
    assert words >= {"turquoise", "violet", "disc", "rhombus", "hoop", "tiny", "huge", "spotted", "checks", "crosses"}


def test_one_scene_has_many_captions_all_true() -> None:
    scene = next(
        scene
        for scene in (sample_scene(Random(index), COMBINATIONS) for index in range(100))
        if scene.relation == "left of"
    )
    texts = {caption(scene, wording) for wording in range(300)}
    assert len(texts) > 200
    assert all(is_true(text, scene) for text in texts)


def test_true_caption_is_true_and_negative_is_false(
    contrasts: tuple[str, list[tuple[Scene, str, str]]], seen: list[Combination]
) -> None:
    _, rows = contrasts
    for scene, true_caption, false_caption in rows:
        assert is_true(true_caption, scene), (true_caption, scene)
        assert not is_true(false_caption, scene), (false_caption, scene)
        for item in parse(true_caption).named + parse(false_caption).named:
            assert item.combination in seen


def test_negative_differs_in_its_one_detail(contrasts: tuple[str, list[tuple[Scene, str, str]]]) -> None:
    kind, rows = contrasts
    for _, true_caption, false_caption in rows:
        true, false = parse(true_caption), parse(false_caption)
        if kind == "replace_rel":
            assert true.named == false.named
            assert RELATIONS[true.skeleton] != RELATIONS[false.skeleton]
            continue
        assert true.skeleton == false.skeleton
        true_colours, false_colours = ([item.attributes["colour"] for item in side.named] for side in (true, false))
        true_shapes, false_shapes = ([item.shape for item in side.named] for side in (true, false))
        if kind == "swap_att":
            assert (false_colours, false_shapes) == (true_colours[::-1], true_shapes)
        else:
            colours_changed = sum(a != b for a, b in zip(true_colours, false_colours, strict=True))
            shapes_changed = sum(a != b for a, b in zip(true_shapes, false_shapes, strict=True))
            assert (colours_changed, shapes_changed) == {"replace_att": (1, 0), "replace_obj": (0, 1)}[kind]


def test_words_alone_cannot_tell_the_negative(contrasts: tuple[str, list[tuple[Scene, str, str]]]) -> None:
    """A naive Bayes classifier over words and word pairs stays at chance (4 standard errors)."""
    _, rows = contrasts
    half = CONTRASTS // 2
    in_true = Counter(term for _, true, _ in rows[:half] for term in _terms(true))
    in_false = Counter(term for _, _, false in rows[:half] for term in _terms(false))

    def score(text: str) -> float:
        return sum(math.log((in_true[term] + 1) / (in_false[term] + 1)) for term in _terms(text))

    correct = [
        0.5 if score(true) == score(false) else float(score(true) > score(false)) for _, true, false in rows[half:]
    ]
    assert abs(sum(correct) / len(correct) - 0.5) < 4 * 0.5 / math.sqrt(len(correct))


@pytest.mark.parametrize("feature", ["length", "words", "one colour", "one shape"])
def test_true_captions_and_negatives_look_alike(
    contrasts: tuple[str, list[tuple[Scene, str, str]]], feature: str
) -> None:
    """No plain feature of the text differs in the mean between the two (4 standard errors)."""
    measure: dict[str, Callable[[str], float]] = {
        "length": len,
        "words": lambda text: len(text.split()),
        "one colour": lambda text: len({item.attributes["colour"] for item in parse(text).named}) == 1,
        "one shape": lambda text: len({item.shape for item in parse(text).named}) == 1,
    }
    _, rows = contrasts
    differences = [measure[feature](true) - measure[feature](false) for _, true, false in rows]
    spread = math.sqrt(sum(difference**2 for difference in differences))
    assert abs(sum(differences)) <= 4 * spread


def _terms(text: str) -> list[str]:
    words = text.split()
    return words + [f"{a} {b}" for a, b in pairwise(words)]
