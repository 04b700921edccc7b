"""What a sample is called elsewhere: by its key, or by the SHA-256 of its picture; as 64 bits.

Of 200 million pictures two have the same 64 bits once in a thousand data sets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from formats.manifest import Shard, usable_samples
from formats.tar import IMAGE_TYPES, Sample

By = Literal["key", "sha256"]
Identities = npt.NDArray[np.uint64]
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_HEX_DIGITS = 16  # of 64 bits


def of_sha256(digests: Iterable[str]) -> Identities:
    """The first 64 bits of each SHA-256 in hex. Raises ValueError for what is none."""
    parts = []
    for digest in digests:
        if not _SHA256.fullmatch(digest):
            raise ValueError(f"{digest[:80]!r} is no SHA-256 in hex")
        parts.append(digest[:_HEX_DIGITS])
    return np.frombuffer(bytes.fromhex("".join(parts)), ">u8").astype(np.uint64)


def of_keys(keys: Iterable[str]) -> Identities:
    """64 bits of each key's hash."""
    return of_sha256(hashlib.sha256(key.encode()).hexdigest() for key in keys)


def of_shard(directory: Path, shard: Shard, by: By) -> Iterator[tuple[str, Identities]]:
    """Each usable sample's key and identities, in order: by SHA-256 that of the file on the web, and that as stored."""
    if by == "key":
        for sample in usable_samples(directory, shard, frozenset({"json", "txt"})):
            yield sample.key, of_keys([sample.key])
        return
    for sample in usable_samples(directory, shard, IMAGE_TYPES | {"json"}):
        stored = [hashlib.sha256(data).hexdigest() for kind, data in sample.members.items() if kind in IMAGE_TYPES]
        yield sample.key, of_sha256([*_on_the_web(sample), *stored])


def look_up(wanted: Identities, known_N: Identities) -> int:
    """The place of the first of `wanted` that is among the sorted `known_N`; -1 if none is."""
    for place in np.searchsorted(known_N, wanted).tolist():
        if place < len(known_N) and known_N[place] in wanted:
            return int(place)
    return -1


def _on_the_web(sample: Sample) -> list[str]:
    try:
        metadata = json.loads(sample.members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return []
    digest = metadata.get("sha256") if isinstance(metadata, dict) else None
    return [digest] if isinstance(digest, str) and _SHA256.fullmatch(digest) else []
