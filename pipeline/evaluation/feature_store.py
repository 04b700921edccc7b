"""Features on disk: computed once per model and collection, in pieces by any number of jobs, read back whole or not.

A collection is cut into batches of fixed extent, and whoever encodes a batch gets the same bits: figures depend neither
on slices nor on ranks. A piece is a file of consecutive batches, named by its first row and the one after its last.

N rows of a collection, n rows of a piece, D embed_dim
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from formats.errors import UserError
from formats.files import write_atomically, write_json
from pipeline.evaluation.tar_samples import ImageFile

_PIECE = re.compile(r"(\d+)-(\d+)\.safetensors")


@dataclass(frozen=True)
class Collection:
    """Distinct images or texts of a data set whose features a task needs; a row of features is an item's place."""

    name: str
    kind: Literal["images", "texts"]
    items: Sequence[ImageFile] | Sequence[str]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def sha256(self) -> str:
        """Names the list of items: texts themselves, of images their place in files."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(f"{item}\0".encode())
            if isinstance(item, ImageFile):
                digest.update(f"{item.path.name}\0{item.offset_bytes}\0{item.size_bytes}\0".encode())
        return digest.hexdigest()


class Piece(NamedTuple):
    """A file with the features of rows `first` to `end` (exclusive)."""

    first: int
    end: int
    path: Path


class FeatureStore:
    """The features of one collection by one model, under OUTPUT/features/."""

    def __init__(self, output: Path, collection: Collection, model: Mapping[str, Any], batch_size: int) -> None:
        """`model` names what computes the features: weights, tokenizer, image size, masking."""
        self.collection = collection
        self.batch_size = batch_size
        self._identity = {
            "collection": collection.name,
            "kind": collection.kind,
            "items": len(collection),
            "items_sha256": collection.sha256,
            "model": dict(model),
            "batch_size": batch_size,
        }
        digest = hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()
        slug = re.sub(r"[^A-Za-z0-9_.-]+", "_", collection.name)
        self.directory = output / "features" / f"{slug}-{digest[:16]}"

    @property
    def num_batches(self) -> int:
        """Batches of the collection; the last may be smaller."""
        return -(-len(self.collection) // self.batch_size)

    def rows(self, batch: int) -> range:
        """The rows of a batch."""
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, len(self.collection)))

    def missing(self, batches: Iterable[int]) -> list[int]:
        """Those of the batches that no piece holds yet."""
        held: set[int] = set()
        for piece in self.pieces():
            held.update(range(piece.first // self.batch_size, -(-piece.end // self.batch_size)))
        return [batch for batch in batches if batch not in held]

    def pieces(self) -> list[Piece]:
        """All pieces, in order."""
        found = []
        for path in self.directory.glob("*.safetensors") if self.directory.is_dir() else ():
            match = _PIECE.fullmatch(path.name)
            if match:
                found.append(Piece(int(match[1]), int(match[2]), path))
        return sorted(found)

    def write(self, first_batch: int, features_nD: Tensor, item_sha256: Sequence[bytes]) -> None:
        """Store the features of consecutive batches, and a hash of each item's content; atomic."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not (self.directory / "collection.json").exists():
            write_json(self.directory / "collection.json", self._identity)
        first = first_batch * self.batch_size
        digests_n32 = torch.frombuffer(bytearray(b"".join(item_sha256)), dtype=torch.uint8).view(-1, 32)
        tensors = {"features": features_nD.float().cpu().contiguous(), "sha256": digests_n32}
        name = f"{first:09d}-{first + len(features_nD):09d}.safetensors"
        write_atomically(self.directory / name, save(tensors))

    def gaps(self) -> list[range]:
        """Rows that no piece holds. Raises UserError if pieces overlap or reach beyond the collection."""
        found, end = [], 0
        for piece in self.pieces():
            if piece.first < end or piece.end > len(self.collection):
                raise UserError(
                    f"{piece.path} holds rows that are there twice, or that {self.collection.name} does not have: two "
                    "jobs with other slices ran at once; delete the file and evaluate again"
                )
            if piece.first > end:
                found.append(range(end, piece.first))
            end = piece.end
        if end < len(self.collection):
            found.append(range(end, len(self.collection)))
        return found

    def load(self) -> tuple[Tensor, str]:
        """All features, fp32 [N, D] on the CPU, and the hash of all items' content.

        Raises UserError if rows are missing, there twice, not readable or not finite.
        """
        gaps = self.gaps()
        if gaps:
            shown = ", ".join(f"{gap.start:,} to {gap.stop - 1:,}" for gap in gaps[:3])
            raise UserError(
                f"{sum(map(len, gaps)):,} of {len(self.collection):,} {self.collection.kind} of {self.collection.name} "
                f"have no features yet (rows {shown}{', …' if len(gaps) > 3 else ''})"
            )
        parts, digest = [], hashlib.sha256()
        for piece in self.pieces():
            try:
                with safe_open(piece.path, framework="pt") as file:  # maps the file: a page is read when it is used
                    parts.append(file.get_tensor("features"))
                    digest.update(file.get_tensor("sha256").numpy().tobytes())
            except (OSError, SafetensorError) as error:
                raise UserError(f"{piece.path} cannot be read ({error}): delete it and evaluate again") from error
            if len(parts[-1]) != piece.end - piece.first:
                raise UserError(f"{piece.path} does not hold the rows of its name: delete it and evaluate again")
            if not parts[-1].isfinite().all():
                raise UserError(f"{piece.path} holds features that are not finite: delete it and evaluate again")
        return torch.cat(parts), digest.hexdigest()
