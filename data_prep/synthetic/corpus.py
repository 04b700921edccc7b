"""A corpus of drawn image-caption pairs, with evaluation sets, that needs no network (layout: docs/formats.md).

Every sample is a pure function of (seed, split, index), so the bytes do not depend on the number of processes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from random import Random

from data_prep.synthetic.drawing import draw_jpeg
from data_prep.synthetic.evaluation_sets import write_classification_set, write_retrieval_set
from data_prep.synthetic.grammar import ZERO_SHOT_TEMPLATES, caption
from data_prep.synthetic.hard_negatives import KINDS, sample_contrast
from data_prep.synthetic.scenes import (
    COLOURS,
    COMBINATIONS,
    SHAPES,
    Combination,
    Scene,
    held_out_combinations,
    sample_scene,
    sample_single,
)
from data_prep.synthetic.studio import BLOCK, Studio
from formats.errors import UserError
from formats.files import building, write_json

FORMAT_VERSION = 1
IMAGES_PER_CLASS = 16
SMALLEST_SIZE = 32  # pixels; below, shapes can no longer be told apart
_IMAGES_PER_FOLDER = 1000


def generate(
    output: Path, train: int, validation: int, size: int, seed: int, processes: int, base_url: str | None
) -> None:
    """Draw a corpus into the folder `output`, which appears under its name only when it is whole.

    `train` and `validation` count pairs, `size` is the side of the pictures in pixels. With `base_url`, also write
    `train.tsv`, a url list in CC3M's form for images served under that address.

    Raises UserError when `output` has content, `size` is too small, the disk refuses, or a process is killed.
    """
    if size < SMALLEST_SIZE:
        raise UserError(f"pictures of {size} pixels are too small to show shapes: use {SMALLEST_SIZE} or more")
    if output.is_dir() and any(output.iterdir()):
        raise UserError(f"{output} is not empty: choose another folder, or remove it")
    try:
        with building(output, overwrite=False) as folder:
            _generate(folder, train, validation, size, seed, processes, base_url)
    except BrokenProcessPool as error:
        raise UserError("a drawing process was killed, perhaps for lack of memory: use fewer --processes") from error
    except OSError as error:
        raise UserError(f"cannot write {error.filename or output}: {error.strerror or error}") from error


def _generate(
    folder: Path, train: int, validation: int, size: int, seed: int, processes: int, base_url: str | None
) -> None:
    held_out = held_out_combinations(seed)
    seen = [combination for combination in COMBINATIONS if combination not in held_out]
    contrasts = max(1, validation // len(KINDS))  # of each kind
    counts = {
        "train": train,
        "validation": validation,
        "zeroshot": IMAGES_PER_CLASS * len(COMBINATIONS),
        "zeroshot_heldout": IMAGES_PER_CLASS * len(held_out),
        "composition": contrasts * len(KINDS),
    }
    with Studio(size, processes, pictures=sum(counts.values())) as studio:
        _write_train(folder, train, seed, seen, base_url, studio)
        _write_validation(folder, validation, seed, seen, studio)
        _write_zero_shot(folder, "zeroshot", COMBINATIONS, seed, studio)
        _write_zero_shot(folder, "zeroshot_heldout", held_out, seed, studio)
        for kind in KINDS:
            _write_contrasts(folder / "eval" / "composition", kind, contrasts, seed, seen, studio)
    description = {
        "format_version": FORMAT_VERSION,
        "seed": seed,
        "image_size": size,
        "samples": counts,
        "colours": COLOURS,
        "shapes": SHAPES,
        "held_out_combinations": [" ".join(combination) for combination in held_out],
    }
    write_json(folder / "synthetic.json", description)


def _write_train(
    folder: Path, count: int, seed: int, seen: Sequence[Combination], base_url: str | None, studio: Studio
) -> None:
    """Draw the training pairs; the processes write their images themselves, since there may be millions."""
    blocks = [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    _write_csv(folder, "train", studio.run(partial(_write_train_block, folder, seed, seen, studio.size), blocks))
    if base_url is not None:
        _write_url_list(folder, base_url.rstrip("/"))


def _write_url_list(folder: Path, base_url: str) -> None:
    with (
        (folder / "train.csv").open(encoding="utf-8", newline="") as table,
        (folder / "train.tsv").open("w", encoding="utf-8") as url_list,
    ):
        for row in csv.DictReader(table):
            url_list.write(f"{row['caption']}\t{base_url}/{row['image']}\n")


def _write_train_block(folder: Path, seed: int, seen: Sequence[Combination], size: int, indices: range) -> list[str]:
    captions = []
    for index in indices:
        scene, text = _sample_captioned(f"{seed} train {index}", seen)
        _write_image(folder / _image_path("train", index), draw_jpeg(scene, size))
        captions.append(text)
    return captions


def _write_validation(folder: Path, count: int, seed: int, seen: Sequence[Combination], studio: Studio) -> None:
    """Draw the validation pairs, as images with a table and as a retrieval set; no two captions are the same."""
    pairs: dict[str, tuple[Scene, str]] = {}
    attempt = 0
    while len(pairs) < count:
        scene, text = _sample_captioned(f"{seed} validation {attempt}", seen)
        pairs.setdefault(text.rstrip("."), (scene, text))
        attempt += 1
    captions = [text for _, text in pairs.values()]
    paths = [folder / _image_path("validation", index) for index in range(count)]
    for path, jpeg in zip(paths, studio.draw([scene for scene, _ in pairs.values()]), strict=True):
        _write_image(path, jpeg)
    _write_csv(folder, "validation", captions)
    samples = ((path.read_bytes(), [text]) for path, text in zip(paths, captions, strict=True))
    write_retrieval_set(folder / "eval" / "retrieval", samples)


def _write_zero_shot(folder: Path, name: str, shown: Sequence[Combination], seed: int, studio: Studio) -> None:
    """Draw single things of the combinations `shown`; all combinations are candidates. Classes alternate."""
    things = [combination for _ in range(IMAGES_PER_CLASS) for combination in shown]
    scenes = [sample_single(Random(f"{seed} {name} {index}"), thing) for index, thing in enumerate(things)]
    labels = [COMBINATIONS.index(thing) for thing in things]
    classnames = [" ".join(combination) for combination in COMBINATIONS]
    samples = zip(studio.draw(scenes), labels, strict=True)
    write_classification_set(
        folder / "eval" / name,
        samples,
        classnames,
        ZERO_SHOT_TEMPLATES,
        allow_empty_classes=len(shown) < len(COMBINATIONS),
    )


def _write_contrasts(
    folder: Path, kind: str, count: int, seed: int, seen: Sequence[Combination], studio: Studio
) -> None:
    """Draw pictures with a true and a false caption each, in SugarCrepe's format."""
    scenes, entries = [], {}
    for index in range(count):
        random = Random(f"{seed} {kind} {index}")
        shown, other = sample_contrast(random, kind, seen)
        wording = random.getrandbits(32)
        scenes.append(shown)
        entries[str(index)] = {
            "filename": f"{kind}_{index:06d}.jpg",
            "caption": caption(shown, wording),
            "negative_caption": caption(other, wording),
        }
    for entry, jpeg in zip(entries.values(), studio.draw(scenes), strict=True):
        _write_image(folder / "images" / entry["filename"], jpeg)
    write_json(folder / f"{kind}.json", entries)


def _sample_captioned(name: str, combinations: Sequence[Combination]) -> tuple[Scene, str]:
    random = Random(name)
    scene = sample_scene(random, combinations)
    return scene, caption(scene, random.getrandbits(32))


def _image_path(split: str, index: int) -> str:
    return f"{split}/images/{index // _IMAGES_PER_FOLDER:02d}/{index:06d}.jpg"


def _write_image(path: Path, jpeg: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg)


def _write_csv(folder: Path, split: str, captions: Iterable[str]) -> None:
    with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(("image", "caption"))
        writer.writerows((_image_path(split, index), text) for index, text in enumerate(captions))
