"""What a shard directory says about itself: manifest.jsonl, one line per shard, and the totals in dataset.json."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from formats.errors import UserError
from formats.files import read_json_lines, write_json, write_json_lines
from formats.tar import SAMPLE_TYPES, Sample, TarSamples
from formats.versions import version_of

FORMAT_VERSION = 1
MANIFEST = "manifest.jsonl"
DATASET = "dataset.json"
PROVENANCE = "provenance.jsonl"  # one line per step that made the directory or changed it
RULES = 1  # of the checks; a shard that was judged by others is judged again


@dataclasses.dataclass(frozen=True)
class ShardLine:
    """A line of the manifest.

    `samples` counts the usable ones. `skipped` gives the keys of the others by reason, a key as often as it occurs.
    `rules` is the version of the checks that the shard passed through; 0 is none of ours.
    """

    shard: str
    samples: int
    size_bytes: int
    sha256: str
    skipped: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    truncated: bool = False
    unknown_members: int = 0
    rules: int = RULES

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
            "shard": self.shard,
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
        if self.unknown_members:
            line["unknown_members"] = self.unknown_members
        return line

    @staticmethod
    def from_json(fields: object) -> ShardLine:
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
        line = ShardLine(
            shard=name,
            samples=_field(fields, "samples", int),
            size_bytes=_field(fields, "bytes", int),
            sha256=_field(fields, "sha256", str, ""),
            skipped=skipped,
            truncated=_field(fields, "truncated", bool, False),
            unknown_members=_field(fields, "unknown_members", int, 0),
            rules=_field(fields, "rules", int, 0),
        )
        if min(line.samples, line.size_bytes, line.unknown_members) < 0:
            raise ValueError("a negative count")
        return line


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
    return paths


def read_manifest(directory: Path) -> list[ShardLine]:
    """The lines of the manifest; raises UserError for one that is missing or damaged."""
    path = directory / MANIFEST
    if not path.is_file():
        find_shards(directory)  # says what is wrong with the directory, if it is that
        raise UserError(f"{directory} has no {MANIFEST}: run `data-prep verify {directory}` first")
    lines, names = [], set()
    with path.open("rb") as stream:
        for number, text in enumerate(stream, 1):
            try:
                line = ShardLine.from_json(json.loads(text))
                if line.shard in names:
                    raise ValueError(f"{line.shard} occurs twice")
            except (ValueError, RecursionError) as error:
                advice = f"delete the file and run `data-prep verify {directory}`"
                raise UserError(f"{path} line {number} is not a manifest line ({error}): {advice}") from error
            lines.append(line)
            names.add(line.shard)
    return lines


def write_manifest(directory: Path, lines: Sequence[ShardLine], source: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Write manifest.jsonl and dataset.json, in this order; returns the latter's content.

    `source` are the lines of provenance.jsonl.
    """
    lines = sorted(lines, key=lambda line: line.shard)
    dataset = _summary(lines, source)
    write_json_lines(directory / MANIFEST, (line.to_json() for line in lines))
    # dataset.json comes last: it describes a manifest that is already there
    write_json(directory / DATASET, dataset)
    return dataset


def _summary(lines: Sequence[ShardLine], source: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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
        "truncated_shards": [line.shard for line in lines if line.truncated],
        "source": list(source),
        "versions": {
            "python": platform.python_version(),
            **{name: version_of(name) for name in ("cluster-clip", "pillow", "simplejpeg")},
        },
    }


def read_provenance(directory: Path) -> list[dict[str, Any]]:
    """One entry per step that made the directory or changed it."""
    return read_json_lines(directory / PROVENANCE)


def usable_samples(directory: Path, line: ShardLine, types: frozenset[str] = SAMPLE_TYPES) -> Iterator[Sample]:
    """The samples of a verified shard that may be used, in order; members of other `types` are not read.

    Raises UserError when the shard is not the one that the manifest describes.
    """
    path, advice = directory / line.shard, f"run `data-prep verify {directory}`"
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
