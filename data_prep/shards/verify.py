"""Check every sample of a shard directory, write its manifest, and mend what can be mended."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.console import print_table, progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.inspection import inspect_shard
from data_prep.shards.manifest import MANIFEST, RULES, ShardLine, find_shards, read_manifest
from data_prep.shards.publish import QUARANTINE, changing, publish, reading
from data_prep.shards.rewrite import Removal, rewrite_shards
from formats.files import sha256_of

PROGRESS = ".verify"  # a folder of files of lines, one for each shard that an unfinished run has judged
EXAMPLES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of one shard: its line, when the file was last written, and whether the manifest had another hash.

    `decoded` tells whether this run decoded it, and did not take the manifest's word for it.
    """

    line: ShardLine
    mtime_ns: int
    decoded: bool
    differs: bool


@dataclasses.dataclass(frozen=True)
class _Task:
    path: Path
    before: ShardLine | None  # the shard's line of the manifest
    again: bool


def verify(directory: Path, processes: int, max_bad_ratio: float, *, repair: bool = False, again: bool = False) -> bool:
    """Read every shard of `directory`, decode every image, write `manifest.jsonl` and `dataset.json`.

    Shards that slices or an interrupted run have judged are not read again while size and time are unchanged; those
    of the manifest are not decoded again while size and hash are unchanged, unless `again`. `repair` rewrites shards
    without their unusable members; a damaged original goes to quarantine/, as does a shard without a usable sample.

    Prints a table of the problems. Returns whether the directory is fit for training: no shard truncated, missing
    or other than the manifest said, at least one usable sample, and a share of unusable ones of at most
    `max_bad_ratio`.

    Raises UserError for a directory that is missing, holds no shard or has a damaged manifest.
    """
    with changing(directory) as staged:
        paths = find_shards(directory)
        before = _manifest_before(directory)
        verdicts = _judge_all(directory, paths, before, processes, again, "rest.jsonl")
        lines = [verdict.line for verdict in verdicts]
        dataset = publish(directory, lines)
        shutil.rmtree(directory / PROGRESS)
        print(f"{directory}: {_totals(dataset['samples'], dataset['shards'], dataset['bytes'])}")
        missing = sorted(before.keys() - {line.shard for line in lines})
        differing = [verdict.line.shard for verdict in verdicts if verdict.differs]
        _print_problems(lines, missing, differing)
        if repair:
            lines = _repair(directory, staged, lines, processes)
    return _print_verdict(lines, missing, differing, max_bad_ratio)


def verify_slice(directory: Path, part: tuple[int, int], processes: int, *, again: bool = False) -> None:
    """Judge share i (from 0) of n, `part` = (i, n), which is every n-th shard, and note what was found.

    `verify` then takes up the notes of all slices, and judges what none of them did.
    """
    number, count = part
    with reading(directory):
        paths = find_shards(directory)[number::count]
        name = f"slice-{number}-of-{count}.jsonl"
        verdicts = _judge_all(directory, paths, _manifest_before(directory), processes, again, name)
    usable = sum(verdict.line.samples for verdict in verdicts)
    size_bytes = sum(verdict.line.size_bytes for verdict in verdicts)
    print(f"{directory}, slice {number}/{count}: {_totals(usable, len(verdicts), size_bytes)}")
    print(f"when all slices are done: data-prep verify {directory}")


def _manifest_before(directory: Path) -> dict[str, ShardLine]:
    has_manifest = (directory / MANIFEST).is_file()
    return {line.shard: line for line in read_manifest(directory)} if has_manifest else {}


def _judge_all(
    directory: Path, paths: Sequence[Path], before: dict[str, ShardLine], processes: int, again: bool, notes: str
) -> list[Verdict]:
    """Judge the shards that no earlier run has noted, noting each one in PROGRESS/`notes` as soon as it is done."""
    progress_folder = directory / PROGRESS
    progress_folder.mkdir(exist_ok=True)
    noted = {verdict.line.shard: verdict for verdict in _read_notes(progress_folder) if verdict.decoded or not again}
    sizes = {path: path.stat() for path in paths}
    verdicts = [
        verdict
        for path, stat in sizes.items()
        if (verdict := noted.get(path.name)) is not None
        and (stat.st_size, stat.st_mtime_ns) == (verdict.line.size_bytes, verdict.mtime_ns)
    ]
    done = {verdict.line.shard for verdict in verdicts}
    tasks = [_Task(path, before.get(path.name), again) for path in paths if path.name not in done]
    total_bytes = sum(stat.st_size for stat in sizes.values())
    done_bytes = sum(verdict.line.size_bytes for verdict in verdicts)
    with (
        progress_bar("verify", total_bytes, "B", initial=done_bytes) as progress,
        (progress_folder / notes).open("a", encoding="utf-8") as stream,
    ):
        for verdict in map_in_processes(_judge, tasks, processes, limit=len(tasks)):
            fields = dataclasses.asdict(verdict) | {"line": verdict.line.to_json()}
            # a line of its own even after one that a killed run left unfinished
            stream.write(f"\n{json.dumps(fields)}\n")
            stream.flush()
            verdicts.append(verdict)
            progress.set_postfix_str(f"{len(verdicts)}/{len(paths)} shards", refresh=False)
            progress.update(verdict.line.size_bytes)
    return sorted(verdicts, key=lambda verdict: verdict.line.shard)


def _judge(task: _Task) -> Verdict:
    stat, before = task.path.stat(), task.before
    is_known = before is not None and before.rules == RULES and before.size_bytes == stat.st_size and not task.again
    if before is not None and is_known and sha256_of(task.path) == before.sha256:
        return Verdict(before, stat.st_mtime_ns, decoded=False, differs=False)
    line = inspect_shard(task.path)
    differs = before is not None and (before.size_bytes, before.sha256) != (line.size_bytes, line.sha256)
    return Verdict(line, stat.st_mtime_ns, decoded=True, differs=differs)


def _read_notes(folder: Path) -> Iterator[Verdict]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as stream:
            for text in stream:
                try:
                    fields = json.loads(text)
                    line = ShardLine.from_json(fields.pop("line"))
                    verdict = Verdict(line, **fields)
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # a blank line, or one that a killed run left unfinished
                if line.rules == RULES:
                    yield verdict


def _repair(directory: Path, staged: Path, lines: Sequence[ShardLine], processes: int) -> list[ShardLine]:
    removals = [Removal(line, keep_original=line.truncated or not line.samples) for line in lines if not line.is_clean]
    if removals:
        step = {"step": "repair"}
        removed = rewrite_shards(directory, staged, removals, step, processes, count=len(removals))
        print(f"repaired {len(removals):,} shards: {removed:,} samples left out")
        kept = [removal.line.shard for removal in removals if removal.keep_original]
        if kept:
            print(f"{len(kept):,} damaged shards are kept in {directory / QUARANTINE}: {_first_few(kept)}")
    return read_manifest(directory)


def _totals(samples: int, shards: int, size_bytes: int) -> str:
    return f"{samples:,} usable samples in {shards:,} shard{'s' if shards != 1 else ''}, {size_bytes / 1e6:,.1f} MB"


def _print_problems(lines: Sequence[ShardLine], missing: Sequence[str], differing: Sequence[str]) -> None:
    places: dict[str, list[str]] = {}
    for line in lines:
        for reason, keys in line.skipped.items():
            places.setdefault(reason, []).extend(f"{line.shard}:{key}" for key in keys)
    rows = [
        (reason, f"{len(found):,}", _first_few(found))
        for reason, found in sorted(places.items(), key=lambda item: -len(item[1]))
    ]
    for problem, shards in (
        ("truncated shard", [line.shard for line in lines if line.truncated]),
        ("missing shard", missing),
        ("other than the manifest said", differing),
    ):
        if shards:
            rows.append((problem, f"{len(shards):,}", _first_few(shards)))
    unknown = [line.shard for line in lines if line.unknown_members]
    if unknown:
        count = sum(line.unknown_members for line in lines)
        rows.append(("unknown member (ignored)", f"{count:,}", _first_few(unknown)))
    if rows:
        print_table(("problem", "count", "first of them"), rows)


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:EXAMPLES_SHOWN]) + (", …" if len(names) > EXAMPLES_SHOWN else "")


def _print_verdict(
    lines: Sequence[ShardLine], missing: Sequence[str], differing: Sequence[str], max_bad_ratio: float
) -> bool:
    usable = sum(line.samples for line in lines)
    bad = sum(line.skipped_samples for line in lines)
    truncated = sum(line.truncated for line in lines)
    failures = []
    if not usable:
        failures.append("no sample is usable")
    elif bad > max_bad_ratio * (usable + bad):
        share = bad / (usable + bad)
        failures.append(f"{share:.2%} of the samples are unusable, more than --max-bad-ratio {max_bad_ratio:.2%}")
    if truncated:
        failures.append(f"{truncated} truncated: make those shards again, or keep what precedes the damage (--repair)")
    if missing:
        failures.append(f"{len(missing)} shards of the manifest before are missing")
    if differing:
        failures.append(f"{len(differing)} shards are other files than the manifest before described")
    for failure in failures:
        print(f"not fit for training as it is: {failure} (the manifest is written all the same)")
    return not failures
