"""Some members of some clusters, to look at: pictures, and the words that are frequent in their captions."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.words import words_of
from formats.clusters import Clusters
from formats.manifest import Shard
from formats.pages import data_uri
from formats.pictures import ImageError, decode_picture
from formats.tar import index_samples

THUMBNAIL_PIXELS = 112
PICTURES = 6
CAPTIONS = 60
# a word is shown where it is in so many times more of a cluster's captions than of all; chance alone gives some more
_CLEARLY_MORE = 1.5


@dataclasses.dataclass
class Examples:
    """Of one cluster: addresses that hold pictures, each with its caption, and words; at most so many as above."""

    pictures: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    captions: list[str] = dataclasses.field(default_factory=list)
    words: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Pick:
    """Rows of a shard to read, each for a cluster; with its picture or the caption alone."""

    shard: Shard
    rows: list[tuple[int, int, bool]]


def find_examples(directory: Path, clusters: Clusters, wanted: Sequence[int], processes: int) -> dict[int, Examples]:
    """Members of the wanted clusters, drawn at random but always the same."""
    picks = list(_choose(clusters, wanted))
    found = {number: Examples() for number in wanted}
    with progress_bar("examples", len(picks), "shard") as progress:
        read = functools.partial(_read, directory)
        for members in map_in_processes(read, picks, processes, limit=len(picks)):
            for number, caption, picture in members:
                found[number].captions.append(caption)
                if picture:
                    found[number].pictures.append((picture, caption))
            progress.update()
    for examples in found.values():  # shards are read in any order
        examples.captions.sort()
        examples.pictures.sort(key=lambda pair: pair[::-1])
    _add_words(found)
    return found


def _choose(clusters: Clusters, wanted: Sequence[int]) -> Iterator[_Pick]:
    """Go through the shards in a random order until there is enough of each cluster."""
    lacking = {number: min(CAPTIONS, int(clusters.sizes_C[number])) for number in wanted}
    chosen = Counter[int]()
    rng = np.random.default_rng(0)
    for place in rng.permutation(len(clusters.manifest.shards)).tolist():
        lacking = {number: count for number, count in lacking.items() if count}
        if not lacking:
            return
        shard = clusters.manifest.shards[place]
        cluster_n = clusters.of(shard)
        rows: list[tuple[int, int, bool]] = []
        for row in rng.permutation(np.flatnonzero(np.isin(cluster_n, list(lacking)))).tolist():
            number = int(cluster_n[row])
            if lacking[number]:
                lacking[number] -= 1
                chosen[number] += 1
                rows.append((row, number, chosen[number] <= PICTURES))
        if rows:
            yield _Pick(shard, rows)


def _read(directory: Path, pick: _Pick) -> list[tuple[int, str, str]]:
    """(cluster, caption, picture as an address or "") of each row."""
    path = directory / pick.shard.name
    spans_n4 = index_samples(path, pick.shard.skip, pick.shard.truncated).spans_n4
    members = []
    with path.open("rb") as tar:
        for row, number, with_picture in pick.rows:
            image_offset, image_bytes, text_offset, text_bytes = spans_n4[row].tolist()
            caption = os.pread(tar.fileno(), text_bytes, text_offset).decode("utf-8", "replace").strip()
            picture = _thumbnail(os.pread(tar.fileno(), image_bytes, image_offset)) if with_picture else ""
            members.append((number, caption, picture))
    return members


def _thumbnail(data: bytes) -> str:
    try:
        image = Image.fromarray(decode_picture(data))
    except ImageError:  # features of others may be there all the same
        return ""
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return data_uri(stream.getvalue(), "image/jpeg")


def _add_words(found: Mapping[int, Examples], most: int = 8) -> None:
    """The words that are in clearly more of a cluster's captions than of those of all that are shown."""
    captions_with = {
        number: Counter(word for caption in examples.captions for word in set(words_of(caption)))
        for number, examples in found.items()
    }
    of_all = sum(captions_with.values(), Counter[str]())
    total = sum(len(examples.captions) for examples in found.values())
    for number, examples in found.items():
        shares = {word: count / len(examples.captions) for word, count in captions_with[number].items()}
        times_more = {word: share * total / of_all[word] for word, share in shares.items()}
        clear = [word for word in shares if times_more[word] >= _CLEARLY_MORE]
        examples.words = sorted(clear, key=lambda word: (-shares[word] * math.log(times_more[word]), word))[:most]
