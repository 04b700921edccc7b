"""Which rows of a url list to keep: thresholds on what the list publishes, captions, languages, block-lists."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.lists.cleaning import canonical_url
from formats.errors import UserError

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_HOST = re.compile(r"[^\s/:@]+")
_HOST_OF_URL = r"^https?://(?P<host>[^/:?#]+)"


@dataclasses.dataclass(frozen=True)
class BlockList:
    """What is blocked; empty sets block nothing."""

    urls: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    sha256s: frozenset[str] = frozenset()

    @functools.cached_property
    def identity(self) -> str:
        """A digest of the content."""
        lines = sorted(self.urls | self.hosts | self.sha256s)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def blocked_urls(self, urls: pa.ChunkedArray) -> pa.ChunkedArray:
        """Which of these canonical urls are listed."""
        return _mask(url in self.urls for url in urls.to_pylist())

    def blocked_hosts(self, urls: pa.ChunkedArray) -> pa.ChunkedArray:
        """Which of these canonical urls are on a listed host or below one: `a.example` blocks `b.a.example`."""
        hosts = pc.struct_field(pc.extract_regex(urls, _HOST_OF_URL), "host")
        blocked = [host for host in pc.unique(hosts).to_pylist() if host is not None and self._covers(host)]
        return pc.is_in(hosts, value_set=pa.array(blocked, pa.string()))

    def blocked_sha256s(self, sha256s: pa.ChunkedArray) -> pa.ChunkedArray:
        """Which of these hashes are listed."""
        return _mask(digest in self.sha256s for digest in pc.utf8_lower(sha256s).to_pylist())

    def _covers(self, host: str) -> bool:
        labels = host.split(".")
        return any(".".join(labels[start:]) in self.hosts for start in range(len(labels)))


def _mask(values: Iterator[bool]) -> pa.ChunkedArray:
    return pa.chunked_array([pa.array(list(values), pa.bool_())])


def read_block_lists(paths: Sequence[str]) -> BlockList:
    """Read text files with one url, host or sha256 per line (told by its form); `#` begins a comment.

    Raises UserError for a line that is none of them, with its number.
    """
    urls: set[str] = set()
    hosts: set[str] = set()
    sha256s: set[str] = set()
    for path in paths:
        # what is not UTF-8 becomes an entry that is refused with its line
        with fsspec.open(path, "rt", encoding="utf-8-sig", errors="replace") as stream:
            for number, line in enumerate(stream, 1):
                entry = line.strip() if "://" in line else line.partition("#")[0].strip()
                if not entry or entry.startswith("#"):
                    continue
                if "\N{REPLACEMENT CHARACTER}" in entry:
                    raise UserError(f"{path}, line {number}: not UTF-8")
                if "://" in entry and (url := canonical_url(entry)):
                    urls.add(url)
                elif _SHA256.fullmatch(entry):
                    sha256s.add(entry.lower())
                elif _HOST.fullmatch(entry) and (url := canonical_url(f"http://{entry}")):
                    hosts.add(url.removeprefix("http://").rstrip("/"))
                else:
                    raise UserError(f"{path}, line {number}: neither a url, nor a host, nor a sha256: {entry[:80]!r}")
    return BlockList(frozenset(urls), frozenset(hosts), frozenset(sha256s))


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

    def columns(self) -> dict[str, str]:
        """The columns that limits are about, each with the option that asks for it."""
        size = ("width", "height")
        needed = {"min_side": size, "max_aspect": size} | {name: (column,) for name, column, _ in _THRESHOLDS}
        flags = {
            column: "--" + name.replace("_", "-")
            for name, columns in needed.items()
            for column in columns
            if getattr(self, name) is not None
        }
        return flags | ({"sha256": "a block-list with sha256 hashes"} if self.block.sha256s else {})


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


def check_detector() -> None:
    """Raise UserError when py3langid is not installed."""
    try:
        import py3langid  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--language on a list without a language column needs py3langid: pip install 'cluster-clip[language]'"
        ) from error


def detect_languages(captions: pa.ChunkedArray) -> pa.Array:
    """ISO 639-1 codes guessed by py3langid, 20 us a caption; short captions are often guessed wrong."""
    check_detector()
    import py3langid

    return pa.array([py3langid.classify(text)[0] for text in captions.to_pylist()], pa.string())
