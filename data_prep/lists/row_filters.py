"""Which rows of a url list to keep: thresholds on what the list publishes, captions, languages, block-lists."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.lists.block_lists import BlockList
from data_prep.lists.languages import detect_languages
from formats.errors import UserError, nearest_of


@dataclasses.dataclass(frozen=True)
class Filters:
    """Limits, all inclusive; None or empty: no limit. Sizes and scores are those that the list publishes."""

    min_caption_chars: int = 1
    max_caption_chars: int = 10_000
    min_caption_words: int = 1
    languages: tuple[str, ...] = ()  # ISO 639-1 codes
    min_side: int | None = None  # pixels of the shorter side
    max_aspect: float | None = None  # longer side over shorter
    min_similarity: float | None = None
    min_aesthetic: float | None = None
    max_punsafe: float | None = None
    max_watermark: float | None = None
    block: BlockList = dataclasses.field(default_factory=BlockList)

    def identity(self) -> str:
        """A text that changes with any limit."""
        limits = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "block"}
        return json.dumps([limits, self.block.identity], sort_keys=True)

    def check_columns(self, present: Sequence[str]) -> None:
        """Raise UserError when a limit is set on a column that the list does not have."""
        for flag, columns in self._needs():
            for column in columns:
                if column not in present:
                    raise UserError(f"{flag} needs a column {column}{nearest_of(column, present)}")

    def _needs(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        size = ("width", "height")
        columns = {"min_side": size, "max_aspect": size} | {name: (column,) for name, column, _ in _THRESHOLDS}
        for name, needed in columns.items():
            if getattr(self, name) is not None:
                yield "--" + name.replace("_", "-"), needed
        if self.block.sha256s:
            yield "a block-list with sha256 hashes", ("sha256",)


_THRESHOLDS: Sequence[tuple[str, str, Callable[[pa.ChunkedArray, float], pa.ChunkedArray]]] = (
    ("min_similarity", "similarity", pc.greater_equal),
    ("min_aesthetic", "aesthetic", pc.greater_equal),
    ("max_punsafe", "punsafe", pc.less_equal),
    ("max_watermark", "watermark", pc.less_equal),
)
_TOO = {"min": "too low", "max": "too high"}


def conditions(table: pa.Table, filters: Filters) -> Iterator[tuple[str, pa.ChunkedArray]]:
    """(reason, rows that pass) in the order in which a row is tested; null, an unknown value, does not pass.

    `table` has the canonical columns. Cheap tests come first; each is computed when it is asked for.
    """
    length = pc.utf8_length(table["caption"])
    yield "caption too short", pc.greater_equal(length, filters.min_caption_chars)
    yield "caption too long", pc.less_equal(length, filters.max_caption_chars)
    if filters.min_caption_words > 1:
        spaces = pc.count_substring(table["caption"], " ")  # cleaned captions have single spaces
        yield "caption too few words", pc.greater_equal(spaces, filters.min_caption_words - 1)
    yield from _size_conditions(table, filters)
    for name, column, passes in _THRESHOLDS:
        limit = getattr(filters, name)
        if limit is not None:
            yield f"{column} unknown", pc.is_valid(table[column])
            yield f"{column} {_TOO[name[:3]]}", passes(table[column], pa.scalar(limit, pa.float32()))
    yield from _block_conditions(table, filters.block)
    if filters.languages:
        codes = pa.array(filters.languages, pa.string())
        yield "another language", pc.is_in(known_languages(table), value_set=codes)


def _size_conditions(table: pa.Table, filters: Filters) -> Iterator[tuple[str, pa.ChunkedArray]]:
    if filters.min_side is None and filters.max_aspect is None:
        return
    shorter = pc.min_element_wise(table["width"], table["height"], skip_nulls=False)
    longer = pc.max_element_wise(table["width"], table["height"], skip_nulls=False)
    yield "size unknown", pc.fill_null(pc.greater(shorter, 0), False)
    if filters.min_side is not None:
        yield "image too small", pc.greater_equal(shorter, filters.min_side)
    if filters.max_aspect is not None:
        aspect = pc.divide(pc.cast(longer, pa.float64()), pc.cast(shorter, pa.float64()))
        yield "image too narrow", pc.less_equal(aspect, filters.max_aspect)


def _block_conditions(table: pa.Table, block: BlockList) -> Iterator[tuple[str, pa.ChunkedArray]]:
    tests: Mapping[str, tuple[frozenset[str], Callable[[pa.ChunkedArray], pa.ChunkedArray], str]] = {
        "url blocked": (block.urls, block.blocked_urls, "url"),
        "host blocked": (block.hosts, block.blocked_hosts, "url"),
        "sha256 blocked": (block.sha256s, block.blocked_sha256s, "sha256"),
    }
    for reason, (entries, blocked, column) in tests.items():
        if entries:
            yield reason, pc.invert(blocked(table[column]))


def known_languages(table: pa.Table) -> pa.ChunkedArray:
    """The list's own language codes, or what the captions look like where it has none."""
    given = pc.utf8_lower(table["language"])
    if given.null_count < len(given):
        return given
    return pa.chunked_array([detect_languages(table["caption"])])
