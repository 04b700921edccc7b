"""Tiny-ImageNet made long-tailed: shards with captions, a tokenizer, an evaluation set for each third of classes.

C classes, from the most frequent
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_imagenet import TEMPLATES, ClassWords, read_classes

from formats.files import read_json, write_json

THIRDS = ("head", "middle", "tail")
_SEED = 0
SHARDS, TOKENIZER, LABELS, SUMMARY = "shards", "tokenizer.model", "ranks.npy", "long_tail.json"


def zipf_counts(classes: int, pictures: int, most: int, exponent: float) -> np.ndarray:
    """Pictures of each class [C], descending, in all `pictures`: as rank^-exponent, but never more than `most`."""
    shares_C = np.arange(1, classes + 1) ** -exponent
    low, high = 0.0, most / shares_C[-1]
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(most, middle * shares_C).sum() < pictures else (low, middle)
    exact_C = np.minimum(most, high * shares_C)
    counts_C = np.floor(exact_C).astype(np.int64)
    missing = pictures - int(counts_C.sum())
    counts_C[np.argsort(counts_C - exact_C, kind="stable")[:missing]] += 1  # those that were rounded down the most
    return -np.sort(-counts_C)


def third_of_ranks(classes: int) -> np.ndarray:
    """0, 1 or 2 for each class [C]: the most frequent third is 0."""
    return np.repeat(np.arange(3), [len(part) for part in np.array_split(np.arange(classes), 3)])


def prepare(train: Path, test: Path, classes: Path, output: Path, pictures: int, exponent: float) -> None:
    """All that runs need. `train` and `test`: parquet with `image` (bytes) and `label`.

    Raises ValueError if a class has too few.
    """
    words = read_classes(classes)
    table = pq.read_table(train, columns=["image", "label"])
    labels = table["label"].to_numpy()
    most = int(np.bincount(labels).min())
    if not len(words) <= pictures <= most * len(words):
        raise ValueError(f"{train} has {most} pictures of a class at least: ask for {most * len(words):,} at most")
    generator = np.random.default_rng(_SEED)
    label_of_rank_C = generator.permutation(len(words))  # rarity has nothing to do with the order of the labels
    counts_C = zipf_counts(len(words), pictures, most, exponent)
    rows = [
        generator.choice(np.flatnonzero(labels == label), count, replace=False)
        for label, count in zip(label_of_rank_C, counts_C, strict=True)
    ]
    order = generator.permutation(pictures)
    rank_of_row = np.repeat(np.arange(len(words)), counts_C)[order]
    captions = [words[label_of_rank_C[rank]].caption(generator) for rank in rank_of_row]
    output.mkdir(parents=True, exist_ok=True)
    _write_shards(output, table.take(np.concatenate(rows)[order]), captions)
    np.save(output / LABELS, rank_of_row, allow_pickle=False)
    _write_sets(output, pq.read_table(test, columns=["image", "label"]), words, label_of_rank_C)
    by_third = [counts_C[third_of_ranks(len(words)) == third] for third in range(3)]
    summary = {
        "pictures": pictures,
        "exponent": exponent,
        "classes": len(words),
        "pictures_of_a_class": {
            name: [int(part.max()), int(part.min())] for name, part in zip(THIRDS, by_third, strict=True)
        },
        "test_classes": {name: len(part) for name, part in zip(THIRDS, by_third, strict=True)},
    }
    write_json(output / SUMMARY, summary)
    print(summary)


def _write_shards(output: Path, table: pa.Table, captions: list[str]) -> None:
    source = output / "train.parquet"
    pq.write_table(pa.table({"image": table["image"], "caption": captions}), source)
    data_prep("pack", source, "--output", output / SHARDS, "--overwrite")
    data_prep("verify", output / SHARDS)
    data_prep(
        *("tokenizer", output / SHARDS, "--model-type", "bpe", "--vocab-size", 2048, "--output", output / TOKENIZER)
    )
    source.unlink()


def _write_sets(output: Path, test: pa.Table, words: list[ClassWords], label_of_rank_C: np.ndarray) -> None:
    """A set for each third: its pictures, to be told from all classes, not from those of the third alone."""
    names, templates = output / "classnames.txt", output / "templates.txt"
    names.write_text("".join(f"{one.lemmas[0]}\n" for one in words))
    templates.write_text("".join(f"{template}\n" for template in TEMPLATES))
    third_C = third_of_ranks(len(words))
    for third, name in enumerate(THIRDS):
        source, directory = output / f"{name}.parquet", output / name
        chosen = np.isin(test["label"].to_numpy(), label_of_rank_C[third_C == third])
        pq.write_table(test.filter(pa.array(chosen)), source)
        labels = ("--label-column", "label", "--classnames", names, "--templates", templates)
        data_prep("pack", source, "--as", "classification", *labels, "--output", directory, "--overwrite")
        declared = directory / "dataset.json"
        known = read_json(declared) if declared.exists() else {}
        write_json(declared, known | {"allow_empty_classes": True})
        source.unlink()


def data_prep(*arguments: object) -> None:
    """One command of data-prep."""
    subprocess.run([sys.executable, "-m", "data_prep", *map(str, arguments)], check=True)
