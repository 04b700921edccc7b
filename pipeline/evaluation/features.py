"""Features of images and texts: decoded ahead in threads, encoded in batches, shared over the ranks.

N images or texts, U distinct ones, D embed_dim, S size of the square image, T padded caption length
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from model.masking import MaskingConfig
from model.patches import normalize_pixels
from pipeline.data.image_transform import ImageError, decode_image, resize_center_crop
from pipeline.errors import UserError
from pipeline.evaluation.masked_images import encode_masked
from pipeline.evaluation.tar_samples import ImageFile
from pipeline.inference import InferenceModel
from pipeline.ranks import Ranks

_BATCHES_AHEAD = 2

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class FeatureEncoder:
    """Encodes with one model; every rank encodes a contiguous share and receives all features.

    `workers` threads decode images: the decoder and the resize release the interpreter's lock.
    `masking`, on request, hides patches of the images as training did; an evaluation looks at whole images otherwise.
    """

    model: InferenceModel
    ranks: Ranks
    batch_size: int
    workers: int
    masking: MaskingConfig | None = None

    def encode_images(self, images: Sequence[ImageFile]) -> Tensor:
        """Unit-length features, fp32 [N, D] on the CPU, in the order of `images`.

        Raises UserError for an image that does not decode and for features that are not finite.
        """
        share = images[rank_share(len(images), self.ranks)]
        with ThreadPoolExecutor(self.workers) as pool:
            decoded = load_ahead(pool, self._load_image, share, ahead=_BATCHES_AHEAD * self.batch_size)
            batches = (torch.stack(batch) for batch in batched(decoded, self.batch_size))
            return self._encode(batches, self._encode_image_batch, len(share), "images")

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-length features, fp32 [N, D] on the CPU, in the order of `texts`.

        Raises UserError for features that are not finite.
        """
        share = texts[rank_share(len(texts), self.ranks)]
        return self._encode(batched(share, self.batch_size), self._encode_text_batch, len(share), "texts")

    def _load_image(self, image: ImageFile) -> Tensor:
        try:
            return resize_center_crop(decode_image(image.read()), self.model.image_size)
        except ImageError as error:
            raise UserError(f"{image} does not decode: {error}; an evaluation leaves no sample out") from error

    def _encode_image_batch(self, images_BCHW: Tensor) -> Tensor:
        images_BCHW = images_BCHW.to(self.ranks.device)
        if self.masking is not None:
            return encode_masked(self.model.clip, images_BCHW, self.masking)
        return self.model.clip.encode_image(normalize_pixels(images_BCHW))

    def _encode_text_batch(self, texts: list[str]) -> Tensor:
        return self.model.clip.encode_text(self.model.tokenizer.encode_batch(texts).to(self.ranks.device))

    @torch.inference_mode()
    def _encode(self, batches: Iterable[Item], encode: Callable[[Item], Tensor], total: int, unit: str) -> Tensor:
        # the empty first part gives a rank without samples the right shape for the gathering
        parts = [torch.empty(0, self.model.clip.config.embed_dim, device=self.ranks.device)]
        failure: UserError | None = None
        with tqdm(total=total, unit=f" {unit}", disable=not self.ranks.is_main, leave=False) as progress:
            try:
                for batch in batches:
                    parts.append(encode(batch).float())
                    progress.update(len(parts[-1]))
            except UserError as error:
                failure = error
        # a rank that left alone would keep the others waiting for its features
        if self.ranks.any(failure is not None):
            raise failure or UserError("another rank could not encode its share: its message says why")
        features_ND = self.ranks.gather_rows(torch.cat(parts)).cpu()
        # checked on what all ranks hold, so that all of them stop
        finite_N = features_ND.isfinite().all(dim=1)
        if not finite_N.all():
            raise UserError(
                f"{self.model.checkpoint} gives features that are not finite for {int((~finite_N).sum())} of "
                f"{len(finite_N)} {unit}: its training diverged; evaluate an earlier checkpoint"
            )
        return features_ND


def rank_share(total: int, ranks: Ranks) -> slice:
    """This rank's contiguous share of `total` items; shares differ by one item at most."""
    return slice(total * ranks.rank // ranks.world_size, total * (ranks.rank + 1) // ranks.world_size)


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


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
