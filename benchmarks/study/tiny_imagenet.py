"""Tiny-ImageNet as pairs: a caption for each picture from its class's names and gloss, and nested subsets.

python benchmarks/study/tiny_imagenet.py DATA FOLDER    # a part of prepare.sh
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TEMPLATES = ("a photo of a {c}.", "a small picture of a {c}.")
SUBSETS = (1500, 6000, 24000, 50000)  # each the beginning of the next; the table's rows are in random order
_SEED = 0


@dataclass(frozen=True)
class ClassWords:
    """What captions say of a class. lemmas: its names, the first the usual one."""

    lemmas: tuple[str, ...]
    gloss: str

    def caption(self, generator: np.random.Generator) -> str:
        """One of three forms, with the usual name or another."""
        lemma = self.lemmas[generator.integers(len(self.lemmas)) if generator.random() < 0.5 else 0]
        form = generator.integers(len(TEMPLATES) + 1)
        return f"{lemma}: {self.gloss}" if form == len(TEMPLATES) else TEMPLATES[form].format(c=lemma)


def read_classes(path: Path) -> list[ClassWords]:
    """A table with columns `lemmas` (a comma between) and `gloss`, a line for each label."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file, delimiter="\t"), key=lambda row: int(row["label"]))
    return [ClassWords(tuple(row["lemmas"].split(", ")), row["gloss"]) for row in rows]


def main() -> None:
    """Write tables for `data-prep pack`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    words = read_classes(options.data / "tiny_imagenet_classes.tsv")
    (options.folder / "tiny_classes.txt").write_text("".join(f"{one.lemmas[0]}\n" for one in words))
    (options.folder / "tiny_templates.txt").write_text("".join(f"{template}\n" for template in TEMPLATES))
    table = pq.read_table(options.data / "tiny_imagenet_train.parquet", columns=["image", "label"])
    generator = np.random.default_rng(_SEED)
    captions = [words[label].caption(generator) for label in table["label"].to_pylist()]
    pairs = pa.table({"image": table["image"], "caption": captions})
    for count in SUBSETS:
        pq.write_table(pairs.slice(0, count), options.folder / f"tiny_{count}.parquet")


if __name__ == "__main__":
    main()
