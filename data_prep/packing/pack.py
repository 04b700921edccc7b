"""Local images and captions -> training shards or evaluation sets; images are stored as they are."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from data_prep.console import print_counts, progress_bar
from data_prep.packing.local_sources import NOT_TAKEN, PICTURE_ENDINGS, Item, Picture, Source
from data_prep.shards.writer import Members, ShardWriter
from data_prep.synthetic.evaluation_sets import write_classification_set, write_retrieval_set
from formats.errors import UserError, nearest_of
from formats.files import building, read_text, to_json, write_json_lines
from formats.manifest import PROVENANCE
from formats.pictures import ImageError, ImageTooLargeError, check_picture, picture_format

DEFAULT_TEMPLATES = ("a photo of a {c}.",)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The classes of a set, what fills their names in, and which number a label of the source stands for."""

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    numbers: dict[str, int]

    def number_of(self, picture: Picture) -> int:
        """The class of a picture that has a label. Raises UserError for a label that is none of them."""
        label = picture.label or ""
        if label in self.numbers:
            return self.numbers[label]
        number = label.removesuffix(".0")  # as pandas writes whole numbers of a column with gaps
        if number.isdecimal() and int(number) < len(self.classnames):
            return int(number)
        hint = nearest_of(label, self.classnames[:20])
        raise UserError(f"{picture.name} has label {label!r}, which is not in --classnames{hint}")


def make_labels(source: Source, classnames: Sequence[str] | None, templates: Sequence[str] | None) -> Labels:
    """Classes by name; of a folder, its subfolders in the order of their names, as torchvision's ImageFolder has it.

    Raises UserError for class names that do not belong to the subfolders, a table without class names, or a template
    without `{c}`.
    """
    if bare := next((template for template in templates or () if "{c}" not in template), None):
        raise UserError(f"--templates: {bare!r} has no {{c}}: write {{c}} where the class name belongs")
    folders = source.classes
    if folders is None and classnames is None:
        raise UserError(f"{source.path} is a table: name its classes with --classnames, a file with one per line")
    if folders == ():
        raise UserError(f"{source.path} has no class folders: a picture's class is the folder that it is in")
    names = tuple(classnames or folders or ())
    by_name = {name: number for number, name in reversed(list(enumerate(names)))}  # of equal names the first
    if folders and not set(folders) <= by_name.keys():
        if len(folders) != len(names):
            other = next(folder for folder in folders if folder not in by_name)
            raise UserError(
                f"{source.path} has {len(folders)} class folders, --classnames {len(names)} names, without "
                f"{other!r}{nearest_of(other, names[:20])}"
            )
        by_name = {folder: number for number, folder in enumerate(folders)}
    return Labels(names, tuple(templates or DEFAULT_TEMPLATES), by_name)


def pack_training(
    source: Source,
    output: Path,
    *,
    each_caption: bool,
    labels: Labels | None = None,
    seed: int = 0,
    samples_per_shard: int = 1000,
    overwrite: bool = False,
) -> int:
    """Write training shards; returns the number of samples.

    One sample per picture, with its first caption, or (`each_caption`) one per caption. With `labels` the caption is a
    template, drawn from the seed and the picture's number, filled with its class.

    Raises UserError when nothing can be packed or `output` has content and `overwrite` is false.
    """
    with _packing(source, output, overwrite) as (partial, tally):
        with ShardWriter(partial, samples_per_shard) as writer:
            pictures = tally.usable(source.read(), labelled=labels is not None)
            for index, (picture, image, caption) in enumerate(_captioned(pictures, each_caption, labels, seed)):
                writer.write(f"{index:09d}", _members(f"{index:09d}", picture, image, caption))
        tally.written = writer.samples
        step = {"step": "pack", "source": source.path.name, "read": tally.read, "dropped": tally.dropped}
        write_json_lines(partial / PROVENANCE, [step])
    return writer.samples


def pack_retrieval(source: Source, output: Path, *, overwrite: bool = False) -> int:
    """Write a retrieval set with all captions of every picture, of all its rows; returns the number of pictures."""
    with _packing(source, output, overwrite) as (partial, tally):
        pictures = tally.usable(_joined(source, tally))
        tally.written = write_retrieval_set(partial, ((image, picture.captions) for picture, image in pictures))
    return tally.written


def pack_classification(source: Source, output: Path, labels: Labels, *, overwrite: bool = False) -> int:
    """Write a zero-shot classification set from labelled pictures; returns their number."""
    with _packing(source, output, overwrite) as (partial, tally):
        filled: set[int] = set()

        def samples() -> Iterator[tuple[bytes, int]]:
            for picture, image in tally.usable(source.read(), labelled=True):
                number = labels.number_of(picture)
                filled.add(number)
                yield image, number

        tally.written = write_classification_set(partial, samples(), labels.classnames, labels.templates)
    empty = [name for number, name in enumerate(labels.classnames) if number not in filled]
    if empty:
        names = ", ".join(empty[:5])
        print(f"note: no picture of {len(empty)} classes ({names}): an evaluation refuses such a set")
    return tally.written


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file; raises UserError when there are none."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: write one entry per line")
    return lines


@dataclasses.dataclass
class _Tally:
    """What became of the rows or files of a source: each gives a picture, is joined to another, or is dropped."""

    source: Source
    progress: tqdm[NoReturn]
    read: int = 0
    written: int = 0
    joined: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)

    def usable(self, items: Iterable[Item], labelled: bool = False) -> Iterator[tuple[Picture, bytes]]:
        """The pictures that can be packed, with their bytes: those with a label, or else with a caption."""
        for item in items:
            self.count_row()
            if isinstance(item, str):
                self.dropped[item] += 1
            elif not (item.label if labelled else item.captions):
                self.dropped["no label" if labelled else "no caption"] += 1
            else:
                try:
                    image = item.read()
                    check_picture(image)
                    yield item, image
                except OSError:
                    self.dropped["image cannot be read"] += 1
                except ImageTooLargeError:
                    self.dropped["image too large"] += 1
                except ImageError:
                    self.dropped[_picture_problem(image, item.name)] += 1

    def count_row(self) -> None:
        """One row or file more was read."""
        self.progress.update()
        self.read += 1

    def print(self, output: Path) -> None:
        """Say what was packed and what was not. Raises UserError when it was nothing."""
        if not self.written:
            reasons = ", ".join(f"{count:,} × {reason}" for reason, count in self.dropped.most_common())
            hint = "; class folders? see --as classification, or --templates" if self.source.classes else ""
            raise UserError(f"nothing of {self.source.path} can be packed: {reasons or 'it is empty'}{hint}")
        unit = "files" if self.source.classes is not None else "rows"
        joined = f", {self.joined:,} of them joined to a row of the same picture" if self.joined else ""
        print(f"{output}: {self.written:,} samples of {self.read:,} {unit}{joined}")
        print_counts("dropped", unit, self.dropped)


def _picture_problem(image: bytes, name: str) -> str:
    if picture_format(image):
        return "image does not decode"
    ending = Path(name).suffix.lower()
    return f"{NOT_TAKEN}: *{ending}" if ending and ending not in PICTURE_ENDINGS else NOT_TAKEN


@contextlib.contextmanager
def _packing(source: Source, output: Path, overwrite: bool) -> Iterator[tuple[Path, _Tally]]:
    """A folder to write to, which becomes `output` if anything was packed, and a tally, which is then printed."""
    if source.path.resolve().is_relative_to(output.resolve()):
        raise UserError(f"--output {output} holds the source {source.path}: choose another folder")
    with building(output, overwrite) as partial:
        with progress_bar("pack", source.count, "img") as progress:
            tally = _Tally(source, progress)
            yield partial, tally
        tally.print(output)


def _joined(source: Source, tally: _Tally) -> Iterator[Item]:
    """Every picture once, at its first row, with the captions of all its rows, wherever in the source they are."""
    captions: dict[str, list[str]] = {}
    for item in source.read():
        if isinstance(item, Picture) and item.captions:
            captions.setdefault(item.identity, []).extend(item.captions)
    for item in source.read():
        if isinstance(item, str) or not item.captions:
            yield item
        elif (texts := captions.pop(item.identity, None)) is not None:
            yield dataclasses.replace(item, captions=tuple(texts))
        else:
            tally.count_row()
            tally.joined += 1


def _members(key: str, picture: Picture, image: bytes, caption: str) -> Members:
    metadata = to_json({"key": key, "filename": picture.name})
    return {
        str(picture_format(image)): image,
        "txt": caption.encode("utf-8"),
        "json": metadata.encode("utf-8", "replace"),
    }


def _captioned(
    pictures: Iterable[tuple[Picture, bytes]], each_caption: bool, labels: Labels | None, seed: int
) -> Iterator[tuple[Picture, bytes, str]]:
    for index, (picture, image) in enumerate(pictures):
        captions = picture.captions if each_caption else picture.captions[:1]
        if labels is not None:
            template = random.Random(f"{seed}/{index}").choice(labels.templates)
            captions = (template.replace("{c}", labels.classnames[labels.number_of(picture)]),)
        for caption in captions:
            yield picture, image, caption
