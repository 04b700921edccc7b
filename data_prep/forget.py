"""Removing what somebody does not want to be trained on: by the hash of a picture, its address, or its host."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from data_prep.console import progress_bar
from data_prep.lists.cleaning import canonical_url
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import QUARANTINE, changing
from data_prep.shards.rewrite import Removal, check_removed, rewrite_shards
from data_prep.web.ledger import forget_rows
from formats.errors import UserError
from formats.files import read_text, sha256_of
from formats.manifest import Shard, read_manifest
from formats.tar import IMAGE_TYPES, Sample, TarSamples

RECORD = "forgotten.jsonl"
_UNSEARCHABLE = "look at {}: what follows the damage cannot be searched; repair or delete it"

Kind = Literal["sha256", "url", "host"]


@dataclasses.dataclass(frozen=True)
class ForgetList:
    """Entries of one kind, in the form in which they are compared."""

    kind: Kind
    name: str
    sha256: str
    entries: frozenset[str]

    def matches(self, sample: Sample) -> bool:
        """Whether a sample is meant, by its metadata or, for a hash, by the picture itself."""
        metadata = _metadata(sample)
        hashes = [str(metadata.get("sha256", ""))]
        if self.kind == "sha256":
            hashes += [_sha256(content) for kind, content in sample.members.items() if kind in IMAGE_TYPES]
        return self.names(str(metadata.get("url", "")), hashes)

    def names(self, url: str, hashes: Sequence[str]) -> bool:
        """Whether the list names what has this address and these hashes."""
        if self.kind == "sha256":
            return any(value.lower() in self.entries for value in hashes)
        address = _url_form(url)
        return any(name in self.entries for name in ([address] if self.kind == "url" else _hosts(address)))


def forget(directory: Path, list_file: Path, kind: Kind, processes: int, max_removed: float = 1.0) -> int:
    """Remove every sample that the list names; returns how many there were.

    Shards that hold one are rewritten and the manifest with them; `forgotten.jsonl` says what was removed when, by
    which list, from which shard, without the content. Quarantined shards that hold one are deleted. Rows of a
    download's ledger that the list names lose address, caption and hashes, and are never tried again.

    Raises UserError for an unusable list, a directory that is not verified or changed since, or a list that names more
    than `max_removed` of the samples.
    """
    forget_list = read_list(list_file, kind)
    with changing(directory) as staged:
        lines = read_manifest(directory).shards
        find = functools.partial(_find, directory, forget_list, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        removals = []
        with progress_bar("search", sum(line.size_bytes for line in lines), "B") as progress:
            for removal in map_in_processes(find, lines, processes, limit=len(lines)):
                progress.update(removal.line.size_bytes)
                if removal.records:
                    removals.append(removal)
        removed = sum(len(removal.records) for removal in removals)
        check_removed(removed, sum(line.samples + line.skipped_samples for line in lines), max_removed)
        step = {"step": "forget", "by": kind, "list": list_file.name, "list_sha256": forget_list.sha256}
        rewrite_shards(directory, staged, removals, step, processes, len(removals), records_name=RECORD)
        rows = forget_rows(directory, forget_list.names)
        (directory / "download.html").unlink(missing_ok=True)  # it may show some of the addresses
        print(
            f"{directory}: {removed:,} samples forgotten, {len(removals):,} shards rewritten, "
            f"{rows:,} rows of the ledger blanked"
        )
        _search_quarantine(directory, forget_list)
        for line in read_manifest(directory).shards:
            if line.truncated:
                print(_UNSEARCHABLE.format(directory / line.name))
    return removed


def read_list(path: Path, kind: Kind) -> ForgetList:
    """One entry per line; empty lines and those that begin with # are left out. Raises UserError if nothing is left."""
    entries = set()
    for number, line in enumerate(read_text(path).split("\n"), 1):
        text = line.strip()
        if text and not text.startswith("#"):
            entry = _PARSERS[kind](text)
            if not entry:
                raise UserError(f"{path} line {number} is no {kind}: {text[:80]!r}")
            entries.add(entry)
    if not entries:
        raise UserError(f"{path} is empty: write one {kind} per line")
    return ForgetList(kind, path.name, sha256_of(path), frozenset(entries))


def _find(directory: Path, forget_list: ForgetList, when: str, line: Shard) -> Removal:
    """What the list names in one shard, the samples that are not used included."""
    types = IMAGE_TYPES | {"json"} if forget_list.kind == "sha256" else {"json"}
    why = {"by": forget_list.kind, "list": forget_list.name, "list_sha256": forget_list.sha256}
    records = [
        {"time": when, "shard": line.name, "key": sample.key, **why, **_hash_of_address(sample)}
        for sample in TarSamples(directory / line.name, types)
        if forget_list.matches(sample)
    ]
    return Removal(line, frozenset(record["key"] for record in records), records)


def _search_quarantine(directory: Path, forget_list: ForgetList) -> None:
    """Delete quarantined shards that hold what is to be forgotten; name those that cannot be read to their end."""
    for path in sorted((directory / QUARANTINE).glob("*.tar")):
        samples = TarSamples(path)
        if any(forget_list.matches(sample) for sample in samples):
            path.unlink()
            print(f"deleted {path}, which holds some of them")
        elif samples.damage is not None:
            print(_UNSEARCHABLE.format(path))


def _url_form(text: str) -> str:
    """An address as it is compared: as `ingest` writes it where it can, without scheme, default port and fragment."""
    try:
        parts = urlsplit(canonical_url(text) or text.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        return ""
    if not host or parts.scheme.lower() not in ("http", "https"):
        return ""
    port_text = f":{port}" if port not in (None, 80, 443) else ""
    query = f"?{parts.query}" if parts.query else ""
    return f"{host}{port_text}{parts.path or '/'}{query}"


def _host_form(text: str) -> str:
    host = text.strip().rstrip(".").removeprefix("*.")
    return "" if set(host) & set("/:@?# \t") else _url_form(f"http://{host}").removesuffix("/")


def _hash_form(text: str) -> str:
    lower = text.lower()
    return lower if len(lower) == 64 and not set(lower) - set("0123456789abcdef") else ""


def _hosts(address: str) -> Iterator[str]:
    """The host of an address and every domain that it lies in."""
    labels = address.partition("/")[0].partition(":")[0].rstrip(".").split(".")
    for first in range(len(labels)):
        yield ".".join(labels[first:])


def _metadata(sample: Sample) -> Mapping[str, Any]:
    try:
        metadata = json.loads(sample.members.get("json", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _hash_of_address(sample: Sample) -> dict[str, str]:
    address = _metadata(sample).get("url")
    return {"url_sha256": _sha256(str(address).encode("utf-8", "replace"))} if address else {}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_PARSERS: Mapping[Kind, Callable[[str], str]] = {"sha256": _hash_form, "url": _url_form, "host": _host_form}
