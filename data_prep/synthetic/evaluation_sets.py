"""Writing evaluation sets in CLIP_benchmark's webdataset layout (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from data_prep.shards.writer import Members, ShardWriter
from formats.errors import UserError
from formats.files import write_atomically, write_json
from formats.pictures import picture_format


def write_classification_set(
    directory: Path,
    samples: Iterable[tuple[bytes, int]],
    classnames: Sequence[str],
    templates: Sequence[str],
    *,
    samples_per_shard: int = 2000,
    allow_empty_classes: bool = False,
) -> int:
    """Write a zero-shot classification set; returns the number of samples.

    `samples` are (encoded image, class index); a template holds `{c}` where the class name goes. An evaluation takes
    a class without a sample for an error, unless the set says that there may be some (`allow_empty_classes`).

    Raises UserError for a class index outside `classnames`, a template without `{c}`, or an image of another type
    than JPEG, PNG and WebP.
    """
    for template in templates:
        if "{c}" not in template:
            raise UserError(f"template {template!r} has no {{c}}: write {{c}} where the class name belongs")

    def members() -> Iterable[Members]:
        for index, (image, label) in enumerate(samples):
            if not 0 <= label < len(classnames):
                raise UserError(f"sample {index} has class {label}, but there are {len(classnames)} class names")
            yield {_extension(image, index): image, "cls": str(label).encode("ascii")}

    write_atomically(directory / "classnames.txt", _lines(classnames))
    write_atomically(directory / "zeroshot_classification_templates.txt", _lines(templates))
    facts = {"allow_empty_classes": True} if allow_empty_classes else {}
    return _write_samples(directory, members(), samples_per_shard, facts)


def write_retrieval_set(
    directory: Path,
    samples: Iterable[tuple[bytes, Sequence[str]]],
    *,
    samples_per_shard: int = 2000,
) -> int:
    """Write an image-text retrieval set; returns the number of samples.

    `samples` are (encoded image, its captions). A caption occupies one line: line breaks in it become spaces.
    """

    def members() -> Iterable[Members]:
        for index, (image, captions) in enumerate(samples):
            lines = [" ".join(caption.split()) for caption in captions]
            if not lines or not all(lines):
                raise UserError(f"sample {index} has no caption or an empty one: every image needs captions")
            yield {_extension(image, index): image, "txt": "\n".join(lines).encode("utf-8")}

    write_atomically(
        directory / "dataset_type.txt", "retrieval\n"
    )  # without it CLIP_benchmark takes captions for classes
    return _write_samples(directory, members(), samples_per_shard, {})


def _write_samples(
    directory: Path, samples: Iterable[Members], samples_per_shard: int, facts: Mapping[str, bool]
) -> int:
    with ShardWriter(directory / "test", samples_per_shard, shard_name="{}.tar".format) as writer:
        for index, members in enumerate(samples):
            writer.write(f"s{index:07d}", members)
    write_json(directory / "dataset.json", {"samples": writer.samples, **facts})
    # the number of shards comes last: readers find a set only once all of it is there
    write_atomically(directory / "test" / "nshards.txt", f"{writer.shards}\n")
    return writer.samples


def _extension(image: bytes, index: int) -> str:
    extension = picture_format(image)
    if extension is None:
        raise UserError(f"sample {index} is not a JPEG, PNG or WebP")
    return extension


def _lines(texts: Sequence[str]) -> str:
    return "".join(f"{' '.join(text.split())}\n" for text in texts)
