"""Hard negatives for composition: pairs of scenes whose captions differ in one detail.

The detail is what a model must see in the picture. Which scene of a pair is drawn is decided by a coin, so captions
of drawn and undrawn scenes have the same distribution: words alone cannot tell the true caption.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from data_prep.synthetic.scenes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    Combination,
    Scene,
    arrange,
    backgrounds_for,
    sample_pair,
)

KINDS = ("swap_att", "replace_obj", "replace_att", "replace_rel")  # names as in SugarCrepe


def sample_contrast(random: Random, kind: str, combinations: Sequence[Combination]) -> tuple[Scene, Scene]:
    """Draw (true scene, false scene) that differ in the detail `kind`, both of `combinations` alone."""
    allowed = set(combinations)
    while True:
        scene = sample_pair(random, combinations)
        other = _altered(scene, kind, random)
        if other is not None and all(thing.combination in allowed for thing in other.things):
            break
    # one background on which both could be drawn
    background = random.choice(backgrounds_for(scene.colours | other.colours))
    pair = replace(scene, background=background), replace(other, background=background)
    return pair if random.random() < 0.5 else pair[::-1]


def _altered(scene: Scene, kind: str, random: Random) -> Scene | None:
    """Change one detail of a scene of two things; None where that would leave its caption true."""
    first, second = scene.things
    if kind == "swap_att":
        if first.colour == second.colour or first.shape == second.shape:
            return None
        swapped = replace(first, colour=second.colour), replace(second, colour=first.colour)
        return replace(scene, things=swapped)
    if kind == "replace_rel":
        relation = random.choice([direction for direction in DIRECTIONS if direction != scene.relation])
        return replace(scene, things=tuple(arrange(scene.things, relation, random)), relation=relation)

    things = list(scene.things)
    index = random.randrange(2)
    if kind == "replace_obj":
        shapes = [shape for shape in SHAPES if shape not in (first.shape, second.shape)]
        things[index] = replace(things[index], shape=random.choice(shapes))
    elif kind == "replace_att":
        colours = [colour for colour in COLOURS if colour not in (first.colour, second.colour)]
        things[index] = replace(things[index], colour=random.choice(colours))
    else:
        raise ValueError(f"no hard negative of kind {kind!r}")
    return replace(scene, things=tuple(things))
