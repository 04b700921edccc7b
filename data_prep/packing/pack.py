"""Local images and captions -> training shards or evaluation sets; images are stored as they are."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_prep.console import print_table, progress_bar
from data_prep.packing.local_sources import Columns, Picture, open_source
from data_prep.shards.writer import Members, ShardWriter
from data_prep.synthetic.evaluation_sets import write_classification_set, write_retrieval_set
from formats.errors import UserError, nearest_of
from formats.files import building, write_json_lines
from formats.manifest import PROVENANCE


def pack_training(
    source: Path,
    output: Path,
    columns: Columns,
    *,
    each_caption: bool,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> int:
    """Write training shards; returns the number of samples.

    One sample per picture, with its first caption, or (`each_caption`) one per caption. With `classnames` and
    `templates` the caption is a template, drawn from the seed and the picture's number, filled with its class.

    Raises UserError when nothing can be packed or `output` has content and `overwrite` is false.
    """
    dropped: Counter[str] = Counter()
    with _building(source, output, overwrite) as partial:
        with (
            _usable(source, columns, dropped, needs_caption=classnames is None) as pictures,
            ShardWriter(partial, samples_per_shard) as writer,
        ):
            if classnames is not None and templates is not None:
                captioned = _from_labels(pictures, classnames, templates, seed)
            else:
                captioned = _from_captions(pictures, each_caption)
            for index, (picture, caption) in enumerate(captioned):
                writer.write(f"{index:09d}", _members(f"{index:09d}", picture, caption))
        _conclude(source, output, writer.samples, dropped)
        write_json_lines(partial / PROVENANCE, [{"step": "pack", "source": source.name, "dropped": dropped}])
    return writer.samples


def pack_retrieval(source: Path, output: Path, columns: Columns, *, overwrite: bool = False) -> int:
    """Write a retrieval set with all captions of every picture; returns the number of pictures."""
    dropped: Counter[str] = Counter()
    with _building(source, output, overwrite) as partial:
        with _usable(source, columns, dropped, needs_caption=True) as pictures:
            written = write_retrieval_set(partial, ((picture.image or b"", picture.captions) for picture in pictures))
        _conclude(source, output, written, dropped)
    return written


def pack_classification(
    source: Path,
    output: Path,
    columns: Columns,
    *,
    classnames: Sequence[str],
    templates: Sequence[str],
    overwrite: bool = False,
) -> int:
    """Write a zero-shot classification set from labelled pictures; returns their number."""
    dropped: Counter[str] = Counter()
    with _building(source, output, overwrite) as partial:
        with _usable(source, columns, dropped) as pictures:
            written = write_classification_set(
                partial,
                ((picture.image or b"", class_index(picture, classnames)) for picture in pictures),
                classnames,
                templates,
            )
        _conclude(source, output, written, dropped)
    return written


def class_index(picture: Picture, classnames: Sequence[str]) -> int:
    """The class of a picture whose label is a class name or the number of one.

    Raises UserError for a label that is neither.
    """
    label = picture.label or ""
    if label in classnames:
        return classnames.index(label)
    if label.isdecimal() and int(label) < len(classnames):
        return int(label)
    shown = classnames[:20]
    raise UserError(f"{picture.name} has label {label!r}, which is not in --classnames{nearest_of(label, shown)}")


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file; raises UserError when there are none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not lines:
        raise UserError(f"{path} is empty: write one entry per line")
    return lines


@contextlib.contextmanager
def _building(source: Path, output: Path, overwrite: bool) -> Iterator[Path]:
    if source.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--output {output} holds the source {source}: choose another folder")
    with building(output, overwrite) as partial:
        yield partial


def _members(key: str, picture: Picture, caption: str) -> Members:
    metadata = json.dumps({"key": key, "filename": picture.name}, ensure_ascii=False)
    return {
        str(picture.extension): picture.image or b"",
        "txt": caption.encode("utf-8", "replace"),
        "json": metadata.encode("utf-8", "replace"),
    }


def _from_captions(pictures: Iterable[Picture], each_caption: bool) -> Iterator[tuple[Picture, str]]:
    for picture in pictures:
        for caption in picture.captions if each_caption else picture.captions[:1]:
            yield picture, caption


def _from_labels(
    pictures: Iterable[Picture], classnames: Sequence[str], templates: Sequence[str], seed: int
) -> Iterator[tuple[Picture, str]]:
    for index, picture in enumerate(pictures):
        template = random.Random(f"{seed}/{index}").choice(templates)
        yield picture, template.replace("{c}", classnames[class_index(picture, classnames)])


@contextlib.contextmanager
def _usable(
    path: Path, columns: Columns, dropped: Counter[str], *, needs_caption: bool = False
) -> Iterator[Iterator[Picture]]:
    """The pictures that can be packed, under a progress bar; the others are counted by reason."""
    source = open_source(path, columns)
    with progress_bar("pack", source.count, "img") as progress:

        def pictures() -> Iterator[Picture]:
            for picture in source.pictures:
                progress.update()
                if picture.image is None:
                    dropped["image cannot be read"] += 1
                elif picture.extension is None:
                    dropped["not a JPEG, PNG or WebP"] += 1
                elif needs_caption and not picture.captions:
                    dropped["no caption"] += 1
                else:
                    yield picture

        yield pictures()


def _conclude(source: Path, output: Path, written: int, dropped: Counter[str]) -> None:
    if not written:
        reasons = ", ".join(f"{count:,} × {reason}" for reason, count in dropped.items())
        raise UserError(f"nothing of {source} can be packed: {reasons or 'it is empty'}")
    print(f"{output}: {written:,} samples")
    if dropped:
        print_table(("dropped", "count"), [(why, f"{count:,}") for why, count in dropped.most_common()])
