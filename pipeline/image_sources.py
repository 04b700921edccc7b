"""Some images of whatever the user has: a folder, a tar, a directory of shards, an evaluation set.

Only what is asked for is read: of a tar the headers, and then the images that are shown.

S side of an image in pixels
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from formats.errors import UserError
from formats.manifest import MANIFEST, read_manifest
from formats.pictures import ImageError, ImageTooLargeError
from formats.tar import CAPTION_TYPE, IMAGE_TYPES, read_tar, split_name
from pipeline.data.image_transform import decode_image, resize_center_crop
from pipeline.data.shard_reader import index_tar
from pipeline.evaluation.sets.composition import GroupSet
from pipeline.evaluation.sets.files import ImageFile
from pipeline.evaluation.sets.layouts import ClassificationSet, MultiLabelSet, RetrievalSet, open_evaluation_set

_MAX_CAPTION_BYTES = 2**16

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class CaptionedImage:
    """An image to show, and what is said of it: its caption, its class, or else its name."""

    image: ImageFile
    caption: str


def read_images(source: Path, count: int = 8) -> list[CaptionedImage]:
    """At most `count` images spread evenly over a source: of a directory of shards, over its first shard.

    Raises UserError if there are none, naming what is expected.
    """
    if source.is_file():
        return _images_of_tar(source, count)
    if not source.exists():
        raise UserError(f"no images at {source}: there is no such file or directory")
    if (source / MANIFEST).is_file():
        return _images_of_shard(source, count)
    if _is_evaluation_set(source):
        return _images_of_evaluation_set(source, count)
    if tars := sorted(source.glob("*.tar")):
        return _images_of_tar(tars[0], count)
    return _images_of_folder(source, count)


def load_image(image: ImageFile, size: int) -> Tensor:
    """Its middle square as evaluation sees it: uint8 [3, S, S]. Raises UserError if it cannot be read or decoded."""
    try:
        return resize_center_crop(decode_image(image.read()), size)
    except ImageTooLargeError as error:
        raise UserError(f"{image} is over the limit: {error}") from error
    except ImageError as error:
        raise UserError(f"{image} does not decode: {error}") from error


def _is_evaluation_set(directory: Path) -> bool:
    is_composition = (directory / "images").is_dir() and any(directory.glob("*.json"))
    return is_composition or (directory / "test" / "nshards.txt").is_file()


def _images_of_evaluation_set(directory: Path, count: int) -> list[CaptionedImage]:
    dataset = open_evaluation_set(directory)
    if isinstance(dataset, ClassificationSet):
        images = [CaptionedImage(sample.image, dataset.class_names[sample.label]) for sample in dataset.samples]
    elif isinstance(dataset, MultiLabelSet):
        names = dataset.class_names
        images = [
            CaptionedImage(sample.image, ", ".join(names[label] for label in sample.labels))
            for sample in dataset.samples
        ]
    elif isinstance(dataset, GroupSet):
        pairs = [pair for sample in dataset.samples for pair in zip(sample.images, sample.captions, strict=True)]
        images = [CaptionedImage(image, caption) for image, caption in pairs]
    elif isinstance(dataset, RetrievalSet):
        images = [CaptionedImage(sample.image, sample.captions[0]) for sample in dataset.samples]
    else:
        captions = {sample.image: sample.caption for sample in dataset.samples}
        images = [CaptionedImage(image, caption) for image, caption in captions.items()]
    return _some(images, count, directory)


def _images_of_shard(directory: Path, count: int) -> list[CaptionedImage]:
    shard = next(iter(read_manifest(directory).shards), None)
    if shard is None:
        raise UserError(f"{directory}/{MANIFEST} names no shard: run `data-prep verify {directory}` again")
    path = shard.local_path
    index = index_tar(shard, path)
    images = []
    for position in _some(range(len(index.keys)), count, directory):
        image_offset, image_size, caption_offset, caption_size = map(int, index.spans_n4[position])
        image = ImageFile(path, index.keys[position], image_offset, image_size)
        images.append(CaptionedImage(image, _read_caption(path, caption_offset, caption_size)))
    return images


def _images_of_tar(path: Path, count: int) -> list[CaptionedImage]:
    """Images of a tar that nobody has verified: what precedes any damage."""
    content = read_tar(path)
    if content.damage is not None and not content.members:
        raise UserError(f"{path} cannot be read: it is {content.damage}; give an uncompressed tar")
    named = [(*split_name(member.name), member) for member in content.members]
    captions = {key: member for key, kind, member in named if kind == CAPTION_TYPE}
    found = [(key, member) for key, kind, member in named if kind in IMAGE_TYPES]
    images = []
    for key, member in _some(found, count, path):
        text = _read_caption(path, *captions[key][1:]) if key in captions else key
        images.append(CaptionedImage(ImageFile(path, *member), text))
    return images


def _images_of_folder(directory: Path, count: int) -> list[CaptionedImage]:
    """Images at any depth, in the order of their names; a caption is a .txt file beside its image."""
    found = (path for path in directory.rglob("*") if split_name(path.name)[0])  # not ._name
    paths = sorted(path for path in found if path.suffix.lower().lstrip(".") in IMAGE_TYPES and path.is_file())
    images = []
    for path in _some(paths, count, directory):
        text = path.with_suffix(f".{CAPTION_TYPE}")
        caption = _read_caption(text, 0, text.stat().st_size) if text.is_file() else str(path.relative_to(directory))
        images.append(CaptionedImage(ImageFile.whole(path), caption))
    return images


def _some(items: Sequence[_Item], count: int, source: Path) -> list[_Item]:
    """At most `count` of the items, evenly spread; raises UserError if there are none."""
    if not items:
        raise UserError(
            f"no images in {source}: expected files of type {', '.join(sorted(IMAGE_TYPES))}, tars of them, or an "
            "evaluation set"
        )
    total, count = len(items), min(len(items), count)
    return [items[(2 * index + 1) * total // (2 * count)] for index in range(count)]


def _read_caption(path: Path, offset_bytes: int, size_bytes: int) -> str:
    with path.open("rb") as file:
        file.seek(offset_bytes)
        return file.read(min(size_bytes, _MAX_CAPTION_BYTES)).decode("utf-8", "replace").strip()
