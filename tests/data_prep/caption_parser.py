"""Reads captions back, with word lists of its own: what the tests of the synthetic corpus judge captions by."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from data_prep.synthetic.scenes import Scene, Thing

NOUNS = {
    "circle": "circle", "disc": "circle", "square": "square", "triangle": "triangle", "star": "star",
    "cross": "cross", "plus sign": "cross", "ring": "ring", "hoop": "ring", "diamond": "diamond",
    "rhombus": "diamond", "hexagon": "hexagon", "heart": "heart", "crescent": "crescent", "moon": "crescent",
}  # fmt: skip
ADJECTIVES = {
    **{word: ("colour", word) for word in ("red", "orange", "yellow", "green", "cyan", "blue")},
    **{word: ("colour", word) for word in ("purple", "pink", "white", "black")},
    "violet": ("colour", "purple"), "turquoise": ("colour", "cyan"),
    "small": ("size", "small"), "little": ("size", "small"), "tiny": ("size", "small"),
    "large": ("size", "large"), "big": ("size", "large"), "huge": ("size", "large"),
    "striped": ("texture", "striped"), "stripy": ("texture", "striped"), "stripes": ("texture", "striped"),
    "dotted": ("texture", "dotted"), "spotted": ("texture", "dotted"), "dots": ("texture", "dotted"),
    "checkered": ("texture", "checkered"), "chequered": ("texture", "checkered"), "checks": ("texture", "checkered"),
    "solid": ("texture", "solid"), "plain": ("texture", "solid"),
}  # fmt: skip
COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5}
PATTERN_WORDS = {
    "plain": "plain", "shaded": "shaded", "gradient": "shaded", "striped": "striped", "stripy": "striped",
    "mottled": "mottled", "cloudy": "mottled", "cluttered": "cluttered", "busy": "cluttered",
}  # fmt: skip
SCENERY_PHRASES = {
    "on grass": "grass", "on a lawn": "grass", "in a meadow": "grass",
    "in the sky": "sky", "in front of clouds": "sky", "in a blue sky": "sky",
    "on a brick wall": "bricks", "in front of bricks": "bricks", "against a wall of bricks": "bricks",
}  # fmt: skip
# what is left of a caption once its nouns are letters -> where X is, seen from Y
RELATIONS = {
    **dict.fromkeys(["X to the left of Y", "X left of Y", "X on the left of Y"], "left of"),
    **dict.fromkeys(["X with Y to its right", "X with Y on its right side", "X with Y on the right"], "left of"),
    **dict.fromkeys(["X to the right of Y", "X right of Y", "X on the right of Y"], "right of"),
    **dict.fromkeys(["X with Y to its left", "X with Y on its left side", "X with Y on the left"], "right of"),
    **dict.fromkeys(["X above Y", "X over Y", "X higher up than Y"], "above"),
    **dict.fromkeys(["X with Y below it", "X with Y under it", "X with Y lower down"], "above"),
    **dict.fromkeys(["X below Y", "X under Y", "X lower down than Y"], "below"),
    **dict.fromkeys(["X with Y above it", "X with Y over it", "X with Y higher up"], "below"),
    **dict.fromkeys(["X inside Y", "X within Y", "X in the middle of Y"], "inside"),
    **dict.fromkeys(["X with Y around it", "X with Y surrounding it", "X with Y enclosing it"], "inside"),
    **dict.fromkeys(["X around Y", "X surrounding Y", "X enclosing Y"], "around"),
    **dict.fromkeys(["X with Y inside it", "X with Y within it", "X with Y in its middle"], "around"),
}

_NOUN_PHRASE = re.compile(
    rf"\b({'|'.join(COUNTS)})((?: (?:{'|'.join(ADJECTIVES)}))+) ({'|'.join(NOUNS)})(?:es|s)?"
    r"(?: with (stripes|dots|checks))?\b"
)
_BACKGROUND = re.compile(rf"(?:on|against) a (?:(light|dark) )?({'|'.join(PATTERN_WORDS)}) background")
_FRAME = re.compile(r"^(?:a photo of|a picture of|an image of|a drawing of|there is|there are) ")


@dataclass
class Named:
    """One thing, or several alike, as a caption names it."""

    count: int
    shape: str
    attributes: dict[str, str] = field(default_factory=dict)

    @property
    def combination(self) -> tuple[str, str]:
        return (self.attributes["colour"], self.shape)

    def fits(self, thing: Thing) -> bool:
        return self.shape == thing.shape and all(getattr(thing, k) == v for k, v in self.attributes.items())


@dataclass
class Parsed:
    """A caption's content; `skeleton` is its wording with the things as letters and the place removed."""

    named: list[Named]
    skeleton: str
    tone: str | None
    pattern: str | None


def parse(caption: str) -> Parsed:
    """Read a caption; ValueError where it does not follow the grammar or names an attribute twice."""
    text, tone, pattern = caption.removesuffix("."), None, None
    if match := _BACKGROUND.search(text):
        tone, pattern = match[1], PATTERN_WORDS[match[2]]
        text = text.replace(match[0], "")
    for phrase, scenery in SCENERY_PHRASES.items():
        if re.search(rf"{phrase}$|^{phrase},", text):
            pattern, text = scenery, text.replace(phrase, "")
    text = text.strip(" ,")

    named = []
    for match in _NOUN_PHRASE.finditer(text):
        item = Named(COUNTS[match[1]], NOUNS[match[3]])
        for word in [*match[2].split(), *([match[4]] if match[4] else [])]:
            kind, value = ADJECTIVES[word]
            if kind in item.attributes:
                raise ValueError(f"{kind} stated twice: {caption}")
            item.attributes[kind] = value
        named.append(item)
    letters = iter("XYZ")
    text = _FRAME.sub("", _NOUN_PHRASE.sub(lambda _: next(letters), text))
    return Parsed(named, text, tone, pattern)


def is_true(caption: str, scene: Scene) -> bool:
    """Whether `scene` shows what `caption` says; ValueError for a caption that cannot be read."""
    parsed = parse(caption)
    if parsed.pattern is not None and parsed.pattern != scene.background.split()[-1]:
        return False
    if parsed.tone is not None and parsed.tone != scene.background.split()[0]:
        return False
    if parsed.skeleton in ("X", "a group of X"):
        (item,) = parsed.named
        return item.count == len(scene.things) and all(item.fits(thing) for thing in scene.things)
    shown = []
    for item in parsed.named:
        fitting = [thing for thing in scene.things if item.fits(thing)]
        if item.count != 1 or len(fitting) > 1:
            raise ValueError(f"names no single thing: {caption}")
        shown += fitting
    if len({id(thing) for thing in shown}) != len(scene.things):
        return False
    if parsed.skeleton == "X, Y and Z":
        return True
    if parsed.skeleton not in RELATIONS:
        raise ValueError(f"unknown wording {parsed.skeleton!r}: {caption}")
    return _holds(RELATIONS[parsed.skeleton], *shown)


def _holds(relation: str, x: Thing, y: Thing) -> bool:
    dx, dy = x.x - y.x, x.y - y.y
    clear = 0.3  # of the picture's side
    return {
        "left of": dx < -clear,
        "right of": dx > clear,
        "above": dy < -clear,
        "below": dy > clear,
        "inside": abs(dx) + abs(dy) + x.radius < 0.5 * y.radius,
        "around": abs(dx) + abs(dy) + y.radius < 0.5 * x.radius,
    }[relation]
