"""How large the common evaluation sets are: a part of one, or its wrong split, must not pass for the set.

Counts are those of the sets' own papers and of CLIP_benchmark's splits; None where versions of a set differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownSet:
    """What the test split of a set holds; `captions_per_image`: at least so many for each."""

    samples: int | None
    classes: int | None = None
    captions_per_image: int | None = None


# Keys as `set_key` makes them of CLIP_benchmark's names.
KNOWN_SETS = {
    "imagenet1k": KnownSet(50_000, classes=1000),
    "imagenetv2": KnownSet(10_000, classes=1000),
    "imageneta": KnownSet(7_500, classes=200),
    "imagenetr": KnownSet(30_000, classes=200),
    "imageneto": KnownSet(2_000, classes=200),
    "imagenetsketch": KnownSet(50_889, classes=1000),
    "objectnet": KnownSet(18_574, classes=113),
    "cifar10": KnownSet(10_000, classes=10),
    "cifar100": KnownSet(10_000, classes=100),
    "mnist": KnownSet(10_000, classes=10),
    "svhn": KnownSet(26_032, classes=10),
    "stl10": KnownSet(8_000, classes=10),
    "food101": KnownSet(25_250, classes=101),
    "sun397": KnownSet(None, classes=397),
    "cars": KnownSet(8_041, classes=196),
    "fgvcaircraft": KnownSet(3_333, classes=100),
    "voc2007": KnownSet(14_976, classes=20),
    "voc2007multilabel": KnownSet(4_952, classes=20),
    "dtd": KnownSet(1_880, classes=47),
    "pets": KnownSet(3_669, classes=37),
    "flowers": KnownSet(6_149, classes=102),
    "eurosat": KnownSet(5_400, classes=10),
    "resisc45": KnownSet(6_300, classes=45),
    "gtsrb": KnownSet(12_630, classes=43),
    "country211": KnownSet(21_100, classes=211),
    "pcam": KnownSet(32_768, classes=2),
    "fer2013": KnownSet(7_178, classes=7),
    "renderedsst2": KnownSet(1_821, classes=2),
    "flickr8k": KnownSet(1_000, captions_per_image=5),
    "flickr30k": KnownSet(1_000, captions_per_image=5),
    "mscococaptions": KnownSet(5_000, captions_per_image=5),
}


def set_key(name: str) -> str:
    """A set by any of its names: `wds_vtab-cifar10`, `vtab/cifar10` and `CIFAR-10` are `cifar10`."""
    plain = re.sub(r"^(wds[_-])?(vtab[/_-])?", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", plain)
