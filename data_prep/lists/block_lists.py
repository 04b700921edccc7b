"""Lists of what must not be downloaded: urls, hosts with all below them, and hashes of images."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence

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
        with fsspec.open(path, "rt", encoding="utf-8", errors="replace") as stream:
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
