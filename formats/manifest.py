"""A shard directory as it describes itself: manifest.jsonl, one line per shard, and the totals in dataset.json."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem

from formats.editions import Edition, source_of
from formats.errors import UserError
from formats.files import read_json_lines, write_json, write_json_lines
from formats.tar import SAMPLE_TYPES, Sample, TarSamples

FORMAT_VERSION = 1
MANIFEST = "manifest.jsonl"
DATASET = "dataset.json"
PROVENANCE = "provenance.jsonl"  # one line per step that made the directory or changed it
RULES = 2  # of the checks; a shard that was judged by others is judged again
VERIFY_AGAIN = "it changed since it was verified; run `data-prep verify` on its directory again"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A tar and its line of the manifest.

    samples: how many are usable
    sha256: "" where whoever wrote the manifest left it out
    skipped: the keys of the others by reason, a key as often as it occurs
    truncated, damage: whether, and why, only what precedes some damage is used
    unusual: how many pictures a reader without formats.pictures' rule may see otherwise, by reason
    edition: of which set it is an edition, if it is one
    rules: the version of the checks that the shard passed through; 0 is none of ours
    directory: where it is, local or remote
    """

    name: str
    samples: int
    size_bytes: int
    sha256: str
    skipped: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    truncated: bool = False
    unknown_members: int = 0
    rules: int = RULES
    damage: str = ""
    unusual: Mapping[str, int] = dataclasses.field(default_factory=dict)
    edition: Edition | None = None
    directory: str = dataclasses.field(default="", compare=False)

    @property
    def url(self) -> str:
        """Where the tar is: its directory, local or remote, and its name."""
        return f"{self.directory}/{self.name}" if self.directory else self.name

    @property
    def is_local(self) -> bool:
        """Whether the tar is a file of this machine, or of a filesystem that it mounts."""
        return split_protocol(self.url)[0] in (None, "file", "local")

    @property
    def local_path(self) -> Path:
        """Where a local tar is."""
        return Path(LocalFileSystem._strip_protocol(self.url))

    @property
    def skip(self) -> frozenset[str]:
        """The keys that must not be used."""
        return frozenset(key for keys in self.skipped.values() for key in keys)

    @property
    def skipped_samples(self) -> int:
        """Samples that must not be used; more than there are keys where one occurs twice."""
        return sum(map(len, self.skipped.values()))

    @property
    def is_clean(self) -> bool:
        """Whether the shard holds nothing but usable samples."""
        return not (self.skipped or self.truncated or self.unknown_members)

    def to_json(self) -> dict[str, Any]:
        """The line as it is written; what is none or no is left out."""
        line: dict[str, Any] = {
            "shard": self.name,
            "samples": self.samples,
            "bytes": self.size_bytes,
            "sha256": self.sha256,
            "rules": self.rules,
        }
        if self.skipped:
            line["skip"] = sorted(self.skip)
            line["skipped"] = {reason: list(keys) for reason, keys in sorted(self.skipped.items())}
        if self.truncated:
            line["truncated"] = True
            line |= {"damage": self.damage} if self.damage else {}
        if self.unknown_members:
            line["unknown_members"] = self.unknown_members
        if self.unusual:
            line["unusual"] = dict(sorted(self.unusual.items()))
        if self.edition is not None:
            line["edition_of"] = self.edition.to_json()
        return line

    @staticmethod
    def from_json(fields: object, directory: str = "") -> Shard:
        """Read what `to_json` gave, or the four fields that another writer must give; raises ValueError."""
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        name = _field(fields, "shard", str)
        if "/" in name or not name.endswith(".tar") or name != name.strip() or not name.isprintable():
            raise ValueError(f"shard name {name!r}")
        skip = {str(key) for key in _field(fields, "skip", list, [])}
        skipped = {str(reason): [str(key) for key in keys] for reason, keys in _key_lists(fields)}
        unexplained = skip.difference(*skipped.values())
        if unexplained:
            skipped["unknown_reason"] = sorted(unexplained)
        shard = Shard(
            name=name,
            samples=_field(fields, "samples", int),
            size_bytes=_field(fields, "bytes", int),
            sha256=_field(fields, "sha256", str, ""),
            skipped=skipped,
            truncated=_field(fields, "truncated", bool, False),
            unknown_members=_field(fields, "unknown_members", int, 0),
            rules=_field(fields, "rules", int, 0),
            damage=_field(fields, "damage", str, ""),
            unusual={str(kind): int(count) for kind, count in _field(fields, "unusual", dict, {}).items()},
            edition=Edition.from_json(fields["edition_of"]) if "edition_of" in fields else None,
            directory=directory,
        )
        if min(shard.samples, shard.size_bytes, shard.unknown_members) < 0:
            raise ValueError("a negative count")
        return shard


@dataclasses.dataclass(frozen=True)
class Manifest:
    """All shards of a directory; `sha256` names the data set in a run's records, that of an edition its source."""

    directory: str
    shards: tuple[Shard, ...]
    sha256: str

    @property
    def num_samples(self) -> int:
        """Usable samples of all shards."""
        return sum(shard.samples for shard in self.shards)


def _field(fields: Mapping[str, Any], name: str, kind: type[Any], default: Any = None) -> Any:
    value = fields.get(name, default)
    # exactly this type: true is no number
    if type(value) is not kind:
        raise ValueError(f"{name!r} is {value!r}" if name in fields else f"{name!r} is missing")
    return value


def _key_lists(fields: Mapping[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    for reason, keys in _field(fields, "skipped", dict, {}).items():
        if not isinstance(keys, list):
            raise ValueError(f"'skipped' has {keys!r}")
        yield reason, keys


def check_directory(directory: Path) -> None:
    """Raise UserError when there is no such directory."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: name the folder that holds 00000.tar, 00001.tar, …")


def find_shards(directory: Path) -> list[Path]:
    """The directory's tars in the order of their names; raises UserError when there are none."""
    check_directory(directory)
    paths = sorted(directory.glob("*.tar"))
    if not paths:
        raise UserError(f"{directory} holds no *.tar: make shards with `data-prep download` or `data-prep pack`")
    for path in paths:
        if path.exists() and not path.is_file():  # of a named pipe the end would never come
            raise UserError(f"{path} is no file: move it out of the folder of the shards")
    return paths


def read_manifest(directory: str | Path) -> Manifest:
    """Read DIRECTORY/manifest.jsonl, local or remote; raises UserError for one that is missing or damaged."""
    directory = str(directory).rstrip("/") or "/"
    try:
        filesystem, path = url_to_fs(directory)
        try:
            content: bytes = filesystem.cat_file(f"{path}/{MANIFEST}")
        except FileNotFoundError:
            raise UserError(_what_is_missing(directory, filesystem, path)) from None
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot read {directory}/{MANIFEST}: {error}") from error
    shards: dict[str, Shard] = {}
    for number, text in enumerate(content.splitlines(), 1):
        try:
            shard = Shard.from_json(json.loads(text), directory)
            if shard.name in shards:
                raise ValueError(f"{shard.name} occurs twice")
        except (ValueError, TypeError, RecursionError) as error:
            where = f"{directory}/{MANIFEST} line {number}"
            advice = f"delete the file and run `data-prep verify {directory}`"
            raise UserError(f"{where} is not a manifest line ({error}): {advice}") from error
        shards[shard.name] = shard
    source_sha256 = source_of(shard.edition for shard in shards.values())
    return Manifest(directory, tuple(shards.values()), source_sha256 or _identity(content))


def _identity(content: bytes) -> str:
    """The hash by which runs know their data. Which version of our checks the shards passed is no part of it.

    Else `verify` with newer checks would keep runs from going on: 1, the first version, stands for all, and remarks are
    left out, as when the runs of before began.
    """
    content = re.sub(rb', "unusual": \{[^}]*\}', b"", content)
    return hashlib.sha256(re.sub(rb'"rules": \d+', b'"rules": 1', content)).hexdigest()


def _what_is_missing(directory: str, filesystem: AbstractFileSystem, path: str) -> str:
    if not filesystem.exists(path):
        return f"no shard directory at {directory}: make it with `data-prep`"
    if not filesystem.isdir(path):
        return f"{directory} is not a directory: name the folder that holds 00000.tar, 00001.tar, …"
    advice = f"run `data-prep verify {directory}` first"
    if not filesystem.glob(f"{path}/*.tar"):
        advice = "it holds no *.tar either; make shards with `data-prep download` or `data-prep pack`"
    return f"{directory} has no {MANIFEST}: {advice}"


def write_manifest(directory: Path, lines: Sequence[Shard], source: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write manifest.jsonl and dataset.json, in this order; returns the latter's content.

    `source` are the lines of provenance.jsonl.
    """
    lines = sorted(lines, key=lambda line: line.name)
    dataset = _summary(lines, source)
    write_json_lines(directory / MANIFEST, (line.to_json() for line in lines))
    # dataset.json comes last: it describes a manifest that is already there
    write_json(directory / DATASET, dataset)
    return dataset


def _summary(lines: Sequence[Shard], source: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    skipped = Counter[str]()
    for line in lines:
        skipped.update({reason: len(keys) for reason, keys in line.skipped.items()})
    return {
        "format_version": FORMAT_VERSION,
        "samples": sum(line.samples for line in lines),
        "shards": len(lines),
        "bytes": sum(line.size_bytes for line in lines),
        "skipped": dict(sorted(skipped.items())),
        "unknown_members": sum(line.unknown_members for line in lines),
        "truncated_shards": [line.name for line in lines if line.truncated],
        "source": list(source),
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in ("cluster-clip", "pillow", "simplejpeg")},
        },
    }


def version_of(package: str) -> str:
    """The installed version of a package; "unknown" for what is only there as a checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def read_provenance(directory: Path) -> list[dict[str, Any]]:
    """One entry per step that made the directory or changed it."""
    return read_json_lines(directory / PROVENANCE)


def usable_samples(directory: Path, line: Shard, types: frozenset[str] = SAMPLE_TYPES) -> Iterator[Sample]:
    """The samples of a verified shard that may be used, in order; members of other `types` are not read.

    Raises UserError when the shard is not the one that the manifest describes.
    """
    path, advice = directory / line.name, f"run `data-prep verify {directory}`"
    size_bytes = path.stat().st_size if path.is_file() else None
    if size_bytes is None:
        raise UserError(f"{path} is in the manifest but not there: {advice}")
    if size_bytes != line.size_bytes:
        raise UserError(f"{path} has {size_bytes} bytes, not {line.size_bytes}: it changed; {advice}")
    skip, found = line.skip, 0
    for sample in TarSamples(path, types):
        if sample.key not in skip:
            found += 1
            yield sample
    if found != line.samples:
        raise UserError(f"{path} holds {found} usable samples, not {line.samples}: it changed; {advice}")
