"""Features of training shards: an array for each shard, a row for each usable sample, in the manifest's order.

n samples of a shard, b of a batch, D embed_dim, S size of the square image
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from formats.arrays import array_path, map_array, write_array
from formats.errors import UserError
from formats.manifest import Shard
from formats.pictures import ImageError
from pipeline.data.image_transform import Preprocessing, decode_image
from pipeline.data.shard_cache import ShardCache
from pipeline.data.shard_reader import OpenShard, ShardReader
from pipeline.evaluation.features import load_ahead

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class ImageEmbedder:
    """What makes features of pictures.

    source: what messages call the model
    encode: features [b, width] of images that `preprocessing` made
    """

    name: str
    source: str
    weights_sha256: str
    width: int
    preprocessing: Preprocessing
    encode: Callable[[list[Tensor]], Tensor]


def unfinished(directory: Path, shards: Sequence[Shard], width: int) -> list[int]:
    """The numbers of the shards that have no array of their size yet; a damaged one counts as none."""
    return [
        number for number, shard in enumerate(shards) if not _is_finished(array_path(directory, shard), shard, width)
    ]


def _is_finished(path: Path, shard: Shard, width: int) -> bool:
    try:
        return path.is_file() and map_array(path).shape == (shard.samples, width)
    except UserError:
        return False


@torch.inference_mode()
def embed_shards(
    embedder: ImageEmbedder,
    shards: Sequence[Shard],
    cache: ShardCache,
    output: Path,
    batch_size: int,
    threads: int,
    progress: Callable[[int], object],
) -> int:
    """Write the arrays of these shards; returns how many of their pictures do not decode: their rows are NaN.

    Raises UserError for a shard that is missing or changed, and for features that are not finite.
    """
    reader = ShardReader(shards, cache)
    undecodable = 0
    with ThreadPoolExecutor(threads) as pool:
        for number, shard in enumerate(shards):
            following = range(number + 1, min(number + 2, len(shards)))
            opened = reader.open(number, partial(_windows, range(number, number + 1), following))
            rows_nD = _embed(embedder, opened, pool, batch_size, progress)
            write_array(array_path(output, shard), rows_nD)
            undecodable += int(np.isnan(rows_nD[:, 0]).sum())
    return undecodable


def _windows(now: range, following: range) -> tuple[range, range]:
    return now, following


def _embed(
    embedder: ImageEmbedder,
    shard: OpenShard,
    pool: ThreadPoolExecutor,
    batch_size: int,
    progress: Callable[[int], object],
) -> npt.NDArray[np.float16]:
    """L2-normalised features, fp16 [n, D]. Batches begin at a shard's first row: whoever embeds it gets the same."""

    def load(sample: int) -> Tensor | None:
        try:
            return embedder.preprocessing(decode_image(shard.read(sample)[0]))
        except ImageError:
            return None

    n = len(shard.index.keys)
    rows_nD = np.full((n, embedder.width), np.nan, np.float16)
    loaded = load_ahead(pool, load, range(n), ahead=_BATCHES_AHEAD * batch_size)
    for first in range(0, n, batch_size):
        images_3SS = list(islice(loaded, batch_size))
        usable = [index for index, image_3SS in enumerate(images_3SS) if image_3SS is not None]
        if usable:
            features_bD = embedder.encode([image_3SS for image_3SS in images_3SS if image_3SS is not None])
            if not features_bD.isfinite().all():
                raise UserError(
                    f"{embedder.source} gives features that are not finite for pictures of {shard.url}: its "
                    "training diverged; take an earlier checkpoint"
                )
            normalised_bD = F.normalize(features_bD.float(), dim=1)
            rows_nD[[first + index for index in usable]] = normalised_bD.half().cpu().numpy()
        progress(len(images_3SS))
    return rows_nD
