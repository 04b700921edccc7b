"""Editions of a shard directory: the same samples in the same order, with pictures of another size.

Each line of an edition's manifest says so under `edition_of`. Where data are named by a manifest's hash, an edition
with all of its shards counts as its source: a run, a balance or features of one are those of the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Edition:
    """What a shard of an edition says of the set that it shows otherwise.

    manifest_sha256: of the source, as formats.manifest.Manifest has it
    shards: with usable samples that the source has, so that an edition is noticed that lost one
    keys_sha256: of the shard's keys in order (`hash_keys`), as the source had them
    """

    manifest_sha256: str
    shards: int
    keys_sha256: str

    def to_json(self) -> dict[str, Any]:
        """As it is written."""
        return {"manifest_sha256": self.manifest_sha256, "shards": self.shards, "keys_sha256": self.keys_sha256}

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Edition:
        """Read what `to_json` gave; raises ValueError."""
        try:
            return Edition(str(fields["manifest_sha256"]), int(fields["shards"]), str(fields["keys_sha256"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"'edition_of' is {fields!r}") from error


def hash_keys(keys: Iterable[str]) -> str:
    """SHA-256 of the keys of samples in their order, each followed by a line feed."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(f"{key}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def source_of(editions: Iterable[Edition | None]) -> str | None:
    """The hash of the manifest whose edition all shards of a directory make up; None where they do not."""
    found = list(editions)
    claims = {None if edition is None else (edition.manifest_sha256, edition.shards) for edition in found}
    claim = claims.pop() if len(claims) == 1 else None
    return claim[0] if claim is not None and claim[1] == len(found) else None
