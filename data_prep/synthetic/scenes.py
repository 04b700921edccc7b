"""Random scenes: what a synthetic picture shows, before anything is drawn or said about it.

Lengths are fractions of the picture's side, x grows to the right and y grows downwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "white", "black")
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "cross",
    "ring",
    "diamond",
    "hexagon",
    "heart",
    "crescent",
)
TEXTURES = ("solid", "striped", "dotted", "checkered")
DIRECTIONS = ("left of", "right of", "above", "below")

PATTERNS = ("plain", "shaded", "striped", "mottled", "cluttered")

# a background and the colours that would be hard to see on it
BACKGROUND_CLASHES: dict[str, set[str]] = {
    **{f"light {pattern}": {"white"} for pattern in PATTERNS},
    **{f"dark {pattern}": {"black"} for pattern in PATTERNS},
    "grass": {"green"},
    "sky": {"cyan", "blue", "white"},
    "bricks": {"red", "orange"},
}

Combination: TypeAlias = tuple[str, str]  # (colour, shape)
COMBINATIONS: tuple[Combination, ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)

# Absolute sizes mean the same in every picture: "small" is at most 0.155 and "large" at least 0.16.
_RADII_ALONE = {"small": (0.125, 0.155), "large": (0.24, 0.31)}
_RADII_AMONG_OTHERS = {"small": (0.09, 0.115), "large": (0.16, 0.18)}
_RADII_HOST = (0.34, 0.40)
_RADII_GUEST = (0.11, 0.14)
_HOSTS = ("circle", "square", "hexagon", "ring")  # room inside for a smaller thing
_HELD_OUT_SHARE = 1 / 8


@dataclass(frozen=True)
class Thing:
    """One object: its attributes in words, its centre, half its extent, and its turn in degrees."""

    colour: str
    shape: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    angle_deg: float

    @property
    def combination(self) -> Combination:
        return (self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """Things on a background; `relation` tells where the first of two things is, seen from the second.

    Without a relation the things are either all alike (one, or a group to be counted) or all different.
    `pixel_seed` decides what words leave open: the background's course, light, and noise.
    """

    things: tuple[Thing, ...]
    background: str
    relation: str | None
    pixel_seed: int

    @property
    def colours(self) -> set[str]:
        return {thing.colour for thing in self.things}


def held_out_combinations(seed: int) -> list[Combination]:
    """Choose about an eighth of all combinations, spread so that every colour and every shape loses few."""
    random = Random(f"held-out {seed}")
    colours = random.sample(COLOURS, len(COLOURS))
    shapes = random.sample(SHAPES, len(SHAPES))
    count = round(_HELD_OUT_SHARE * len(colours) * len(shapes))
    # walk along the diagonals of the colour x shape table: after n steps each row has floor(n/rows) or one more
    return [
        (colours[step % len(colours)], shapes[(step + step // len(colours)) % len(shapes)]) for step in range(count)
    ]


def sample_scene(random: Random, combinations: Sequence[Combination]) -> Scene:
    """Draw any kind of scene: one thing (35 %), two in relation (45 %), a group (12 %), three different (8 %)."""
    kind = random.random()
    if kind < 0.35:
        return sample_single(random, random.choice(combinations))
    if kind < 0.70:
        return sample_pair(random, combinations)
    if kind < 0.80:
        return _sample_nested_pair(random, combinations)
    if kind < 0.92:
        return _sample_group(random, random.choice(combinations))
    return _sample_trio(random, combinations)


def sample_single(random: Random, combination: Combination) -> Scene:
    """Draw a scene of one thing, most often large."""
    size = "large" if random.random() < 0.7 else "small"
    radius = random.uniform(*_RADII_ALONE[size])
    margin = radius + 0.06
    x, y = random.uniform(margin, 1 - margin), random.uniform(margin, 1 - margin)
    return _scene(random, [_thing(random, combination, size, x, y, radius)])


def sample_pair(random: Random, combinations: Sequence[Combination]) -> Scene:
    """Draw a scene of two different things side by side or one above the other."""
    relation = random.choice(DIRECTIONS)
    pair = random.sample(combinations, 2)
    return _scene(random, arrange([_thing_among_others(random, c) for c in pair], relation, random), relation)


def arrange(things: Sequence[Thing], relation: str, random: Random) -> list[Thing]:
    """Move two things so that the first is `relation` (one of DIRECTIONS) the second, and no other direction holds."""
    near, far = 0.27 + random.uniform(-0.015, 0.015), 0.73 + random.uniform(-0.015, 0.015)
    level = random.uniform(0.35, 0.65)
    levels = [level + random.uniform(-0.03, 0.03) for _ in things]
    along = [near, far] if relation in ("left of", "above") else [far, near]
    if relation in ("left of", "right of"):
        return [replace(thing, x=a, y=b) for thing, a, b in zip(things, along, levels, strict=True)]
    return [replace(thing, x=b, y=a) for thing, a, b in zip(things, along, levels, strict=True)]


def backgrounds_for(colours: set[str]) -> list[str]:
    """Name the backgrounds on which all of these colours are easy to see."""
    return [name for name, clashes in BACKGROUND_CLASHES.items() if not clashes & colours]


def _sample_nested_pair(random: Random, combinations: Sequence[Combination]) -> Scene:
    host_combination = random.choice([c for c in combinations if c[1] in _HOSTS])
    guest_combination = random.choice([c for c in combinations if c[0] != host_combination[0]])
    x, y = random.uniform(0.44, 0.56), random.uniform(0.44, 0.56)
    host = _thing(random, host_combination, "large", x, y, random.uniform(*_RADII_HOST))
    host = replace(host, texture="solid")  # the guest must stand out
    guest = _thing(random, guest_combination, "small", x, y, random.uniform(*_RADII_GUEST))
    # drawn in this order, the guest comes out on top
    return _scene(random, [host, guest], "around")


def _sample_group(random: Random, combination: Combination) -> Scene:
    size = "large" if random.random() < 0.3 else "small"
    count = random.randint(2, 4 if size == "large" else 5)
    model = _thing_among_others(random, combination, size)
    return _scene(random, _scatter([model] * count, random))


def _sample_trio(random: Random, combinations: Sequence[Combination]) -> Scene:
    things = [_thing_among_others(random, combination) for combination in random.sample(combinations, 3)]
    return _scene(random, _scatter(things, random))


def _scatter(things: Sequence[Thing], random: Random) -> list[Thing]:
    """Put things into different cells of a grid that is as coarse as the largest of them needs."""
    rows = (0.27, 0.73) if any(thing.size == "large" for thing in things) else (0.18, 0.5, 0.82)
    cells = random.sample([(x, y) for x in rows for y in rows], len(things))
    jitter = 0.015
    return [
        replace(
            thing,
            x=x + random.uniform(-jitter, jitter),
            y=y + random.uniform(-jitter, jitter),
            angle_deg=_angle_deg(random),
        )
        for thing, (x, y) in zip(things, cells, strict=True)
    ]


def _thing_among_others(random: Random, combination: Combination, size: str | None = None) -> Thing:
    size = size or random.choice(("small", "large"))
    return _thing(random, combination, size, 0.5, 0.5, random.uniform(*_RADII_AMONG_OTHERS[size]))


def _thing(random: Random, combination: Combination, size: str, x: float, y: float, radius: float) -> Thing:
    texture = "solid" if random.random() < 0.5 else random.choice(TEXTURES[1:])
    return Thing(*combination, texture, size, x, y, radius, _angle_deg(random))


def _angle_deg(random: Random) -> float:
    return random.uniform(-10, 10)  # more would turn squares into diamonds


def _scene(random: Random, things: Sequence[Thing], relation: str | None = None) -> Scene:
    background = random.choice(backgrounds_for({thing.colour for thing in things}))
    return Scene(tuple(things), background, relation, random.getrandbits(32))
