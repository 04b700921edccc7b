"""What papers print: which figures together, in which order, under which names; and their rows, never computed with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from formats.errors import UserError
from formats.files import read_text


@dataclass(frozen=True)
class Measure:
    """One figure of one set, which goes by several names (as `known_sets.set_key` makes them)."""

    key: str
    label: str
    sets: tuple[str, ...]
    metric: str
    heading: str = ""


@dataclass(frozen=True)
class Mean:
    """The mean of figures, which is shown only where there are all of them."""

    key: str
    label: str
    of: tuple[str, ...]


@dataclass(frozen=True)
class PaperLayout:
    """A table as papers print it."""

    name: str
    title: str
    subtitle: str
    measures: tuple[Measure, ...]
    means: tuple[Mean, ...] = ()


# Key: label, other names.
_SEVENTEEN: dict[str, tuple[str, tuple[str, ...]]] = {
    "food101": ("Food101", ()),
    "cifar10": ("CIFAR10", ()),
    "cifar100": ("CIFAR100", ()),
    "sun397": ("SUN397", ()),
    "cars": ("Cars", ("stanfordcars",)),
    "voc2007": ("VOC2007", ()),
    "aircraft": ("Aircraft", ("fgvcaircraft",)),
    "dtd": ("DTD", ()),
    "pets": ("Pets", ("oxfordpets", "oxfordiiitpet")),
    "caltech101": ("Caltech101", ()),
    "flowers": ("Flowers", ("flowers102", "oxfordflowers102")),
    "stl10": ("STL10", ()),
    "eurosat": ("EuroSAT", ()),
    "resisc45": ("RESISC45", ()),
    "gtsrb": ("GTSRB", ()),
    "country211": ("Country211", ()),
    "pcam": ("PCam", ("patchcamelyon",)),
}


def _retrieval_measures() -> tuple[Measure, ...]:
    sets = {
        "coco": ("COCO", ("mscococaptions", "coco", "mscoco", "cococaptions")),
        "flickr8k": ("Flickr8k", ("flickr8k",)),
        "flickr30k": ("Flickr30k", ("flickr30k",)),
    }
    return tuple(
        Measure(f"{key}_{way}@{k}", f"R@{k}", names, f"{way}_retrieval_recall@{k}", f"{label} {way}")
        for way in ("text", "image")
        for key, (label, names) in sets.items()
        for k in (1, 5, 10)
    )


IMAGENET = ("imagenet1k", "imagenet", "in1k")
_SHIFTED = {
    "imagenet_v2": ("IN-V2", ("imagenetv2", "inv2")),
    "imagenet_a": ("IN-A", ("imageneta", "ina")),
    "imagenet_r": ("IN-R", ("imagenetr", "inr")),
    "imagenet_o": ("IN-O", ("imageneto", "ino")),
    "imagenet_sketch": ("Sketch", ("imagenetsketch", "insketch")),
}
_SUGARCREPE = {"replace": ("obj", "att", "rel"), "swap": ("obj", "att"), "add": ("obj", "att")}

ZERO_SHOT = PaperLayout(
    "zero_shot",
    "Zero-shot classification, 17 sets",
    "top-1, in percent",
    tuple(Measure(key, label, (key, *names), "acc1") for key, (label, names) in _SEVENTEEN.items()),
    (Mean("mean", "mean", tuple(_SEVENTEEN)),),
)
RETRIEVAL = PaperLayout("retrieval", "Retrieval", "recall of texts and of images, in percent", _retrieval_measures())
LINEAR_PROBE = PaperLayout(
    "linear_probe",
    "Linear probe",
    "top-1, in percent",
    (
        Measure("cifar10", "CIFAR10", ("cifar10",), "lp_acc1"),
        Measure("cifar100", "CIFAR100", ("cifar100",), "lp_acc1"),
        Measure("imagenet", "IN-1K", IMAGENET, "lp_acc1"),
    ),
)
# The paper's ID mean is that of all six, its OOD mean that of the five other than ImageNet itself.
ROBUSTNESS = PaperLayout(
    "robustness",
    "Robustness",
    "zero-shot top-1, in percent; ID: mean of the six, OOD: mean of all but IN-1K",
    (
        Measure("imagenet", "IN-1K", IMAGENET, "acc1"),
        *(Measure(key, label, names, "acc1") for key, (label, names) in _SHIFTED.items()),
    ),
    (Mean("id", "ID", ("imagenet", *_SHIFTED)), Mean("ood", "OOD", tuple(_SHIFTED))),
)
SUGARCREPE = PaperLayout(
    "sugarcrepe",
    "SugarCrepe",
    "share of images nearer to their caption than to its negative, in percent",
    tuple(
        Measure(f"{way}_{part}", part, ("sugarcrepe",), f"acc/{way}_{part}", heading=way.upper())
        for way, parts in _SUGARCREPE.items()
        for part in parts
    ),
)
# And what a run has of accuracy by rarity, which differs from set to set.
RARITY = PaperLayout(
    "rarity",
    "By rarity",
    "zero-shot top-1, in percent: of rare classes, and of a set's classes by how rare their words and clusters are",
    (Measure("letitwag", "Let It Wag!", ("letitwag",), "acc1"),),
)
LAYOUTS = (ZERO_SHOT, RETRIEVAL, LINEAR_PROBE, ROBUSTNESS, SUGARCREPE)


PUBLISHED_FILE = Path(__file__).with_name("published.yaml")


Percent = Annotated[float, Field(ge=0, le=100)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PublishedTable(_Strict):
    """Figures by method, in percent, in the order of `columns`. source: where it is not that of all tables."""

    source: str = ""
    columns: tuple[str, ...]
    rows: dict[str, tuple[Percent, ...]]

    @model_validator(mode="after")
    def _has_whole_rows(self) -> PublishedTable:
        for method, figures in self.rows.items():
            if len(figures) != len(self.columns):
                raise ValueError(f"{method} has {len(figures)} figures for {len(self.columns)} columns")
        return self

    def figures(self, method: str) -> dict[str, float]:
        """A method's figures by column."""
        return dict(zip(self.columns, self.rows[method], strict=True))


class PublishedCost(_Strict):
    """A system's ImageNet top-1, in percent, and its training in GPU-hours."""

    system: str
    data: str
    imagenet: Percent
    gpu_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    source: str


class Published(_Strict):
    """Published tables by the name of their group; `methods`: training time relative to CLIP's."""

    source: str = ""
    methods: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    tables: dict[str, PublishedTable] = {}
    costs: tuple[PublishedCost, ...] = ()


def read_published(file: Path = PUBLISHED_FILE) -> Published:
    """The published rows of a file. Raises UserError if it is missing or has another form."""
    try:
        return Published.model_validate(yaml.safe_load(read_text(file)))
    except OSError as error:
        raise UserError(f"cannot read the published rows {file}: {error.strerror}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file}, {where}: {first['msg']}; pipeline/reporting/tables/published.yaml shows the form"
        ) from error
