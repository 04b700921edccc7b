"""Encoding a collection: decoded ahead in threads, in batches whose extent is fixed, shared over slices and ranks.

n images or texts of a piece, D embed_dim, S size of the square image
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from formats.errors import UserError
from model.masking import MaskingConfig
from model.patches import normalize_pixels
from pipeline.data.image_transform import ImageError, decode_image, resize_center_crop
from pipeline.evaluation.feature_store import FeatureStore
from pipeline.evaluation.masked_images import encode_masked
from pipeline.evaluation.slices import Slice
from pipeline.evaluation.tar_samples import ImageFile
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks

_BATCHES_AHEAD = 2
# Of a job that is killed, so many batches are encoded again.
_BATCHES_OF_A_PIECE = 32

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class FeatureEncoder:
    """Encodes with one model what is missing of this slice's and rank's share of a collection.

    `workers` threads decode images: the decoder and the resize release the interpreter's lock.
    `masking`, on request, hides patches of the images as training did; an evaluation looks at whole images otherwise.
    """

    model: InferenceModel
    ranks: Ranks
    workers: int
    masking: MaskingConfig | None = None

    def encode(self, store: FeatureStore, part: Slice) -> int:
        """Store what is missing of the share; returns the number of rows encoded on this rank (collective).

        Raises UserError, on all ranks, if one meets an image that does not decode or features that are not finite.
        """
        batches = store.missing(part.share(store.num_batches, self.ranks))
        total = sum(len(store.rows(batch)) for batch in batches)
        failure: UserError | None = None
        description = f"{store.collection.name} {store.collection.kind}"
        hidden = not self.ranks.is_main or not batches
        with tqdm(total=total, desc=description, unit="", disable=hidden, leave=False) as progress:
            try:
                if batches:
                    with ThreadPoolExecutor(self.workers) as pool:
                        self._encode(store, batches, pool, progress.update)
            except UserError as error:
                failure = error
        # a rank that left alone would keep the others waiting
        if self.ranks.any(failure is not None):
            raise failure or UserError("another rank could not encode its share: its message says why")
        return total

    @torch.inference_mode()
    def _encode(
        self, store: FeatureStore, batches: Sequence[int], pool: ThreadPoolExecutor, progress: Callable[[int], object]
    ) -> None:
        items = (store.collection.items[row] for batch in batches for row in store.rows(batch))
        is_images = store.collection.kind == "images"
        load: Callable[[Any], tuple[Any, bytes]] = self._load_image if is_images else _load_text
        encode: Callable[[list[Any]], Tensor] = self._encode_images if is_images else self._encode_texts
        loaded = load_ahead(pool, load, items, ahead=_BATCHES_AHEAD * store.batch_size)
        for piece in consecutive(batches, _BATCHES_OF_A_PIECE):
            features, item_sha256 = [], []
            for batch in piece:
                contents = list(islice(loaded, len(store.rows(batch))))
                features.append(encode([content for content, _ in contents]))
                item_sha256 += [sha256 for _, sha256 in contents]
                progress(len(contents))
            features_nD = torch.cat(features)
            self._check_finite(features_nD, store)
            store.write(piece.start, features_nD, item_sha256)

    def _check_finite(self, features_nD: Tensor, store: FeatureStore) -> None:
        finite_n = features_nD.isfinite().all(dim=1)
        if not finite_n.all():
            raise UserError(
                f"{self.model.checkpoint} gives features that are not finite for {int((~finite_n).sum())} of "
                f"{len(finite_n)} {store.collection.kind} of {store.collection.name}: its training diverged; evaluate "
                "an earlier checkpoint"
            )

    def _load_image(self, image: ImageFile) -> tuple[Tensor, bytes]:
        data = image.read()
        try:
            pixels_3SS = resize_center_crop(decode_image(data), self.model.image_size)
        except ImageError as error:
            raise UserError(f"{image} does not decode: {error}; an evaluation leaves no sample out") from error
        return pixels_3SS, hashlib.sha256(data).digest()

    def _encode_images(self, images_3SS: list[Tensor]) -> Tensor:
        images_BCHW = torch.stack(images_3SS).to(self.ranks.device)
        if self.masking is not None:
            return encode_masked(self.model.clip, images_BCHW, self.masking)
        return self.model.clip.encode_image(normalize_pixels(images_BCHW))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        return self.model.clip.encode_text(self.model.tokenizer.encode_batch(texts).to(self.ranks.device))


def _load_text(text: str) -> tuple[str, bytes]:
    return text, hashlib.sha256(text.encode()).digest()


def consecutive(numbers: Sequence[int], longest: int) -> Iterator[range]:
    """Ascending numbers as ranges without holes, none longer than `longest`."""
    start = 0
    for index in range(1, len(numbers) + 1):
        ends = index == len(numbers) or numbers[index] != numbers[index - 1] + 1 or index - start == longest
        if ends:
            yield range(numbers[start], numbers[index - 1] + 1)
            start = index


def distinct(items: Sequence[Key]) -> tuple[list[Key], Tensor]:
    """The U distinct items in order of appearance, and int64 [N]: where each of `items` is among them."""
    index_of = {item: index for index, item in enumerate(dict.fromkeys(items))}
    return list(index_of), torch.tensor([index_of[item] for item in items], dtype=torch.int64)


def load_ahead(
    pool: ThreadPoolExecutor, load: Callable[[Item], Loaded], items: Iterable[Item], ahead: int
) -> Iterator[Loaded]:
    """`map(load, items)` in threads, in order, never more than `ahead` items before the consumer."""
    pending: deque[Future[Loaded]] = deque()
    for item in items:
        pending.append(pool.submit(load, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
