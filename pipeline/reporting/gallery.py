"""Retrieval with the pictures: some captions with the images nearest to them, some images with their nearest captions.

Queries are spread evenly over the set, neither the best nor the worst; pictures are few and small, so that a page is.

I images, C captions, U distinct captions, D embed_dim
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.evaluation.sets.layouts import RetrievalSample, RetrievalSet
from pipeline.evaluation.tasks import retrieval
from pipeline.evaluation.tasks.task import distinct
from pipeline.image_sources import load_image
from pipeline.reporting.mask_pictures import jpeg_bytes, to_pillow
from pipeline.reporting.stored_features import StoredJob

MAX_GALLERIES = 3
_TEXT_QUERIES, _IMAGE_QUERIES, _HITS = 5, 3, 5
_THUMBNAIL_PIXELS = 112
_CAPTION_LETTERS = 160

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class ImageHit:
    """An image that was found."""

    jpeg: bytes
    is_right: bool


@dataclass(frozen=True)
class CaptionHit:
    """A caption that was found."""

    caption: str
    is_right: bool


@dataclass(frozen=True)
class TextQuery:
    """A caption, the images nearest to it, and where its own image came."""

    caption: str
    outcome: str
    hits: tuple[ImageHit, ...]


@dataclass(frozen=True)
class ImageQuery:
    """An image and the captions nearest to it."""

    jpeg: bytes
    hits: tuple[CaptionHit, ...]


@dataclass(frozen=True)
class Gallery:
    """Both kinds of queries of one checkpoint on one set."""

    title: str
    subtitle: str
    text_queries: tuple[TextQuery, ...]
    image_queries: tuple[ImageQuery, ...]


def draw_gallery(stored: StoredJob) -> Gallery:
    """Some queries of a retrieval job. Raises UserError if features are missing or an image does not decode."""
    dataset = stored.job.dataset
    assert isinstance(dataset, RetrievalSet)
    features = stored.features(retrieval.TASK)
    captions = [caption for sample in dataset.samples for caption in sample.captions]
    texts, text_C = distinct(captions)
    image_C = torch.arange(len(dataset.samples)).repeat_interleave(
        torch.tensor([len(sample.captions) for sample in dataset.samples])
    )
    images_ID, texts_UD = features["images"], features["captions"]
    return Gallery(
        title=stored.job.dataset_name,
        subtitle=f"{stored.label}; {len(dataset.samples):,} images, {len(captions):,} captions. Queries are spread "
        "evenly over the set; what belongs together is marked.",
        text_queries=tuple(
            _ask_for_images(dataset.samples, captions[c], images_ID @ texts_UD[text_C[c]], int(image_C[c]))
            for c in spread(range(len(captions)), _TEXT_QUERIES)
        ),
        image_queries=tuple(
            _ask_for_captions(dataset.samples[i], texts, texts_UD @ images_ID[i])
            for i in spread(range(len(dataset.samples)), _IMAGE_QUERIES)
        ),
    )


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items, from the middles of equally long stretches."""
    count = min(count, len(items))
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def _ask_for_images(samples: Sequence[RetrievalSample], caption: str, scores_I: Tensor, right: int) -> TextQuery:
    nearest = scores_I.argsort(descending=True, stable=True)[:_HITS].tolist()
    rank = 1 + int((scores_I > scores_I[right]).sum())
    return TextQuery(
        _shorten(caption),
        f"its image comes {_ordinal(rank)} of {len(samples):,}",
        tuple(ImageHit(_thumbnail(samples[i]), i == right) for i in nearest),
    )


def _ask_for_captions(sample: RetrievalSample, texts: Sequence[str], scores_U: Tensor) -> ImageQuery:
    nearest = scores_U.argsort(descending=True, stable=True)[:_HITS].tolist()
    hits = tuple(CaptionHit(_shorten(texts[u]), texts[u] in sample.captions) for u in nearest)
    return ImageQuery(_thumbnail(sample), hits)


def _thumbnail(sample: RetrievalSample) -> bytes:
    return jpeg_bytes(to_pillow(load_image(sample.image, _THUMBNAIL_PIXELS)))


def _shorten(caption: str) -> str:
    return caption if len(caption) <= _CAPTION_LETTERS else f"{caption[: _CAPTION_LETTERS - 1]}…"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number:,}{ending}"
