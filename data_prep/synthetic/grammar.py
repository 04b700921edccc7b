"""Captions: true English sentences about a scene, in many wordings.

A wording is a number that seeds every choice of words. Each choice takes one random number whatever it chooses from,
and how many choices there are depends on a scene's structure alone (how many things, which textures, related or not).
So two scenes that differ in a colour, a shape or a direction get the same sentence around the words that differ:
the captions of `hard_negatives` rely on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from data_prep.synthetic.scenes import Scene, Thing

# the usual word first: it is taken more often than all others together
SYNONYMS = {
    "circle": ("circle", "disc"),
    "ring": ("ring", "hoop"),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus sign"),
    "crescent": ("crescent", "moon"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big", "huge"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "checkered": ("checkered", "chequered"),
    "solid": ("solid", "plain"),
    "shaded": ("shaded", "gradient"),
    "mottled": ("mottled", "cloudy"),
    "cluttered": ("cluttered", "busy"),
}
_USUAL_WORD_SHARE = 0.7

COUNT_WORDS = ("no", "one", "two", "three", "four", "five")
INVERSE = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
    "inside": "around",
    "around": "inside",
}
# "X … Y": where the first is, seen from the second
BETWEEN = {
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "higher up than"),
    "below": ("below", "under", "lower down than"),
    "inside": ("inside", "within", "in the middle of"),
    "around": ("around", "surrounding", "enclosing"),
}
# "X with Y …": where the second is, seen from the first
AFTER = {
    "left of": ("to its left", "on its left side", "on the left"),
    "right of": ("to its right", "on its right side", "on the right"),
    "above": ("above it", "over it", "higher up"),
    "below": ("below it", "under it", "lower down"),
    "inside": ("inside it", "within it", "in its middle"),
    "around": ("around it", "surrounding it", "enclosing it"),
}
SCENERY = {
    "grass": ("on grass", "on a lawn", "in a meadow"),
    "sky": ("in the sky", "in front of clouds", "in a blue sky"),
    "bricks": ("on a brick wall", "in front of bricks", "against a wall of bricks"),
}
TEXTURE_AFTERWARDS = {"striped": "with stripes", "dotted": "with dots", "checkered": "with checks"}
# where an option stands more than once, it is that much likelier
FRAMES = (
    "{}",
    "{}",
    "{}",
    "a photo of {}",
    "a picture of {}",
    "an image of {}",
    "a drawing of {}",
    "there {verb} {}",
)
FRAMES_AFTER_PLACE = ("{}", "there {verb} {}")
PLACE_AT = (*["nowhere"] * 5, *["end"] * 4, "start")

ZERO_SHOT_TEMPLATES = (
    "{c}",
    "a {c}",
    "a photo of a {c}",
    "a picture of a {c}.",
    "an image of a {c}",
    "a {c} on a plain background",
    "there is a {c}.",
)


def caption(scene: Scene, wording: int) -> str:
    """Say what `scene` shows: every thing's colour and shape, the count, the relation, and some of the rest."""
    words = _Words(wording)
    subject = _subject(scene, words)
    place, place_at = _place(scene.background, words), words.pick(PLACE_AT)
    sentence = words.pick(FRAMES if place_at != "start" else FRAMES_AFTER_PLACE).format(
        subject, verb="are" if subject.split()[0] in COUNT_WORDS else "is"
    )
    if place_at == "start":
        sentence = f"{place}, {sentence}"
    elif place_at == "end":
        sentence = f"{sentence} {place}"
    return sentence + words.pick(("", "", "."))


class _Words:
    """Random choices that each take exactly one number from the generator."""

    def __init__(self, wording: int) -> None:
        self._random = Random(wording)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, options: Sequence[str]) -> str:
        return options[int(self._random.random() * len(options))]

    def say(self, word: str) -> str:
        """`word` or one of its synonyms."""
        number = self._random.random()
        synonyms = SYNONYMS.get(word, (word,))
        if number < _USUAL_WORD_SHARE or len(synonyms) == 1:
            return synonyms[0]
        share = (number - _USUAL_WORD_SHARE) / (1 - _USUAL_WORD_SHARE)
        return synonyms[1 + int(share * (len(synonyms) - 1))]


def _subject(scene: Scene, words: _Words) -> str:
    things = scene.things
    if scene.relation is not None:
        return _related(scene.relation, *(_one(thing, words, alone=False) for thing in things), words=words)
    if len(things) == 1:
        return _one(things[0], words, alone=True)
    if len({thing.combination for thing in things}) == 1:
        return _group(things[0], len(things), words)
    names = [_one(thing, words, alone=False) for thing in things]
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _related(relation: str, first: str, second: str, *, words: _Words) -> str:
    if words.chance(0.5):
        first, second, relation = second, first, INVERSE[relation]
    if words.chance(0.6):
        return f"{first} {words.pick(BETWEEN[relation])} {second}"
    return f"{first} with {second} {words.pick(AFTER[INVERSE[relation]])}"


def _one(thing: Thing, words: _Words, *, alone: bool) -> str:
    phrase = _noun_phrase(thing, words.say(thing.shape), words, alone=alone)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _group(thing: Thing, count: int, words: _Words) -> str:
    noun = words.say(thing.shape)
    plural = noun + ("es" if noun.endswith("s") else "s")
    phrase = _noun_phrase(thing, plural, words, alone=True)
    return words.pick(("{} {}", "{} {}", "{} {}", "a group of {} {}")).format(COUNT_WORDS[count], phrase)


def _noun_phrase(thing: Thing, noun: str, words: _Words, *, alone: bool) -> str:
    """Adjectives in one of the usual orders, then the noun; the texture may follow it where nothing else does."""
    size = words.say(thing.size) if words.chance(0.5) else ""
    texture = words.say(thing.texture) if words.chance(0.1 if thing.texture == "solid" else 0.75) else ""
    order = words.pick(("size texture colour", "size texture colour", "size colour texture", "texture last"))
    colour = words.say(thing.colour)
    if order == "texture last" and alone and texture and thing.texture != "solid":
        parts = [size, colour, noun, TEXTURE_AFTERWARDS[thing.texture]]
    elif order == "size colour texture":
        parts = [size, colour, texture, noun]
    else:
        parts = [size, texture, colour, noun]
    return " ".join(part for part in parts if part)


def _place(background: str, words: _Words) -> str:
    if background in SCENERY:
        return words.pick(SCENERY[background])
    tone, pattern = background.split()
    tone = f"{tone} " if words.chance(0.4) else ""
    # every pattern's name starts with a consonant
    return f"{words.pick(('on', 'on', 'against'))} a {tone}{words.say(pattern)} background"
