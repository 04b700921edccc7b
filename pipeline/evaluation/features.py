"""Features on disk: computed once per model and collection, in pieces by any number of jobs, read back whole or not.

A collection is cut into batches of fixed extent, and whoever encodes a batch gets the same bits: figures depend neither
on slices nor on ranks. A piece is a file of consecutive batches, named by its first row and the one after its last. It
holds the hash of each item's content too: features of what is no longer in the set are never taken for its own.

N rows of a collection, n rows of a piece, D embed_dim, S size of the square image
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from formats.errors import UserError
from formats.files import make_folder, write_atomically, write_json
from formats.pictures import ImageError, why_unusual
from model.clip import CLIP
from model.masking import MaskingConfig
from pipeline.data.captions import Tokenizer
from pipeline.data.image_transform import Preprocessing, decode_image
from pipeline.evaluation.masked_images import encode_masked
from pipeline.evaluation.results import ModelIdentity
from pipeline.evaluation.sets.files import Collection, ImageFile
from pipeline.ranks import Ranks

_PIECE = re.compile(r"(\d+)-(\d+)\.safetensors")
_BATCHES_AHEAD = 2
# Of a job that is killed, so many batches are encoded again.
_BATCHES_OF_A_PIECE = 32
_READERS = 16
# Pieces without this mark are older: they saw turned, transparent and 16-bit pictures otherwise.
_DECODER = "formats.pictures"

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Piece(NamedTuple):
    """A file with the features of rows `first` to `end` (exclusive)."""

    first: int
    end: int
    path: Path

    def damaged(self, problem: object) -> UserError:
        """What to say of it, and do, if it is not what was written."""
        return UserError(f"{self.path} {problem}: delete it and evaluate again")


class FeatureStore:
    """The features of one collection by one model, under OUTPUT/features/."""

    def __init__(self, output: Path, collection: Collection, model: Mapping[str, Any], batch_size: int) -> None:
        """`model` names what computes the features: weights, tokenizer, preprocessing, masking."""
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
        """Those of the batches that no piece holds; a piece of other content than the set has now is removed."""
        wanted, held = list(batches), set[int]()
        for piece in self.pieces():
            its_batches = range(piece.first // self.batch_size, -(-piece.end // self.batch_size))
            if not held.issuperset(its_batches) and not set(its_batches).isdisjoint(wanted):
                if self._is_current(piece):
                    held.update(its_batches)
                else:
                    piece.path.unlink(missing_ok=True)  # another rank may have been faster
        return [batch for batch in wanted if batch not in held]

    def pieces(self) -> list[Piece]:
        """All pieces, in order."""
        matches = [(_PIECE.fullmatch(path.name), path) for path in self.directory.glob("*.safetensors")]
        return sorted(Piece(int(match[1]), int(match[2]), path) for match, path in matches if match)

    def write(self, first_batch: int, features_nD: Tensor, item_sha256: Sequence[bytes]) -> None:
        """Store the features of consecutive batches, and a hash of each item's content; atomic."""
        make_folder(self.directory)
        if not (self.directory / "collection.json").exists():
            write_json(self.directory / "collection.json", self._identity)
        first = first_batch * self.batch_size
        digests_n32 = torch.frombuffer(bytearray(b"".join(item_sha256)), dtype=torch.uint8).view(-1, 32)
        tensors = {"features": features_nD.float().cpu().contiguous(), "sha256": digests_n32}
        name = f"{first:09d}-{first + len(features_nD):09d}.safetensors"
        write_atomically(self.directory / name, save(tensors, {"decoder": _DECODER}))

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

    def load(self, is_checked: bool = False) -> tuple[Tensor, str]:
        """All features, fp32 [N, D] on the CPU, and the hash of all items' content.

        `is_checked`: `missing` has just compared the pieces with what the set holds.
        Raises UserError if rows are missing, there twice, not readable, not finite or of another content.
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
            if not is_checked and not self._is_current(piece):
                raise UserError(f"{self.collection.name} has changed since the features in {piece.path} were computed")
            features_nD, digests_n32, _ = self._read(piece)
            if not features_nD.isfinite().all():
                raise piece.damaged("holds features that are not finite")
            parts.append(features_nD)
            digest.update(digests_n32.numpy().tobytes())
        if len({part_nD.shape[1] for part_nD in parts}) > 1:
            raise UserError(f"the pieces in {self.directory} are of several models: delete them and evaluate again")
        return torch.cat(parts), digest.hexdigest()

    def _read(self, piece: Piece) -> tuple[Tensor, Tensor, str | None]:
        """Features [n, D], digests [n, 32], decoder. UserError: it is damaged; FileNotFoundError: it is gone."""
        try:
            with safe_open(piece.path, framework="pt") as file:  # maps the file: a page is read when it is used
                features_nD, digests_n32 = file.get_tensor("features"), file.get_tensor("sha256")
                decoder = (file.metadata() or {}).get("decoder")
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError) as error:
            raise piece.damaged(f"cannot be read ({error})") from error
        n = piece.end - piece.first
        if features_nD.dtype != torch.float32 or features_nD.dim() != 2 or len(features_nD) != n:
            raise piece.damaged("does not hold the rows of its name")
        if digests_n32.dtype != torch.uint8 or digests_n32.shape != (n, 32):
            raise piece.damaged("does not say which content its rows are of")
        return features_nD, digests_n32, decoder

    def _is_current(self, piece: Piece) -> bool:
        """Whether its features are of what the collection holds now, and of the right pixels."""
        if self.collection.kind == "texts":
            return True  # the store's name has their hash
        try:
            _, digests_n32, decoder = self._read(piece)
        except FileNotFoundError:  # removed by another rank
            return False

        def is_current(image: ImageFile, digest_32: Tensor) -> bool:
            data = image.read()
            is_same = hashlib.sha256(data).digest() == bytes(digest_32.tolist())
            return is_same and (decoder == _DECODER or _is_usual(data))

        with ThreadPoolExecutor(_READERS) as pool:
            return all(pool.map(is_current, self.collection.items[piece.first : piece.end], digests_n32))


def _is_usual(data: bytes) -> bool:
    try:
        return why_unusual(data) is None
    except ImageError:
        return False


@dataclass(frozen=True)
class FeatureEncoder:
    """Encodes with one model what is missing of a share of a collection.

    `workers` threads decode images: the decoder and the resize release the interpreter's lock. The model's identity
    says in which precision it computes. `masking`, on request, hides patches of the images as training did; an
    evaluation looks at whole images otherwise.
    """

    model: ModelIdentity
    clip: CLIP
    tokenizer: Tokenizer
    preprocessing: Preprocessing
    ranks: Ranks
    workers: int
    masking: MaskingConfig | None = None

    def encode(self, store: FeatureStore, share: Iterable[int]) -> int:
        """Store what is missing of a share of the batches, ascending; returns the number of rows encoded.

        Raises UserError for an image that does not decode and for features that are not finite.
        """
        batches = store.missing(share)
        total = sum(len(store.rows(batch)) for batch in batches)
        description = f"{store.collection.name} {store.collection.kind}"
        # None: only on a terminal
        hidden = None if self.ranks.is_main and batches else True
        with tqdm(total=total, desc=description, unit="", disable=hidden, leave=False) as progress:
            if batches:
                with ThreadPoolExecutor(self.workers) as pool:
                    self._encode(store, batches, pool, progress.update)
        return total

    @torch.inference_mode()
    def _encode(
        self, store: FeatureStore, batches: Sequence[int], pool: ThreadPoolExecutor, progress: Callable[[int], object]
    ) -> None:
        items = (store.collection.items[row] for batch in batches for row in store.rows(batch))
        is_images = store.collection.kind == "images"
        load: Callable[[Any], tuple[Any, bytes]] = self._load_image if is_images else _load_text
        encode: Callable[[list[Any]], Tensor] = self.encode_images if is_images else self._encode_texts
        loaded = load_ahead(pool, load, items, ahead=_BATCHES_AHEAD * store.batch_size)
        for piece in consecutive(batches, _BATCHES_OF_A_PIECE):
            features, item_sha256 = [], []
            for batch in piece:
                contents = list(islice(loaded, len(store.rows(batch))))
                with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.model.precision == "bf16"):
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
            pixels_3SS = self.preprocessing(decode_image(data))
        except ImageError as error:
            raise UserError(f"{image} does not decode: {error}; an evaluation leaves no sample out") from error
        return pixels_3SS, hashlib.sha256(data).digest()

    def encode_images(self, images_3SS: list[Tensor]) -> Tensor:
        """Features [B, D] of images that are uint8 squares, as `preprocessing` makes them."""
        images_BCHW = torch.stack(images_3SS).to(self.ranks.device)
        if self.masking is not None:
            return encode_masked(self.clip, images_BCHW, self.masking)
        return self.clip.encode_image(self.preprocessing.normalize(images_BCHW))

    def _encode_texts(self, texts: list[str]) -> Tensor:
        return self.clip.encode_text(self.tokenizer.encode_batch(texts).to(self.ranks.device))


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
