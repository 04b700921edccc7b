"""Check every sample of a shard directory, write its manifest, and mend what can be mended."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.console import print_table, progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import QUARANTINE, changing, publish, reading
from data_prep.shards.rewrite import Removal, rewrite_shards
from data_prep.shards.writer import count_unusual
from formats.files import sha256_of
from formats.manifest import MANIFEST, RULES, Shard, find_shards, read_manifest
from formats.pictures import ImageError, ImageTooLargeError, check_picture
from formats.tar import IMAGE_TYPES, Sample, TarSamples
from formats.texts import TextError, decode_text

PROGRESS = ".verify"  # a folder of files of lines, one for each shard that an unfinished run has judged
EXAMPLES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of one shard: its line, when the file was last written, and whether the manifest had another hash.

    `decoded` tells whether this run decoded it, and did not take the manifest's word for it.
    """

    line: Shard
    mtime_ns: int
    decoded: bool
    differs: bool


@dataclasses.dataclass(frozen=True)
class _Task:
    path: Path
    before: Shard | None  # the shard's line of the manifest
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
        verdicts = _check_shards(directory, paths, before, processes, again, "rest.jsonl")
        lines = [verdict.line for verdict in verdicts]
        dataset = publish(directory, lines)
        shutil.rmtree(directory / PROGRESS)
        print(f"{directory}: {_totals(dataset['samples'], dataset['shards'], dataset['bytes'])}")
        missing = sorted(before.keys() - {line.name for line in lines})
        differing = [verdict.line.name for verdict in verdicts if verdict.differs]
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
        verdicts = _check_shards(directory, paths, _manifest_before(directory), processes, again, name)
    usable = sum(verdict.line.samples for verdict in verdicts)
    size_bytes = sum(verdict.line.size_bytes for verdict in verdicts)
    print(f"{directory}, slice {number}/{count}: {_totals(usable, len(verdicts), size_bytes)}")
    print(f"when all slices are done: data-prep verify {directory}")


def _manifest_before(directory: Path) -> dict[str, Shard]:
    has_manifest = (directory / MANIFEST).is_file()
    return {line.name: line for line in read_manifest(directory).shards} if has_manifest else {}


def _check_shards(
    directory: Path, paths: Sequence[Path], before: dict[str, Shard], processes: int, again: bool, notes: str
) -> list[Verdict]:
    """Judge the shards that no earlier run has noted, noting each one in PROGRESS/`notes` as soon as it is done."""
    progress_folder = directory / PROGRESS
    progress_folder.mkdir(exist_ok=True)
    noted = {verdict.line.name: verdict for verdict in _read_notes(progress_folder) if verdict.decoded or not again}
    sizes = {path: path.stat() for path in paths}
    verdicts = [
        verdict
        for path, stat in sizes.items()
        if (verdict := noted.get(path.name)) is not None
        and (stat.st_size, stat.st_mtime_ns) == (verdict.line.size_bytes, verdict.mtime_ns)
    ]
    done = {verdict.line.name for verdict in verdicts}
    tasks = [_Task(path, before.get(path.name), again) for path in paths if path.name not in done]
    total_bytes = sum(stat.st_size for stat in sizes.values())
    done_bytes = sum(verdict.line.size_bytes for verdict in verdicts)
    with (
        progress_bar("verify", total_bytes, "B", initial=done_bytes) as progress,
        (progress_folder / notes).open("a", encoding="utf-8") as stream,
    ):
        for verdict in map_in_processes(_check_shard, tasks, processes, limit=len(tasks)):
            fields = dataclasses.asdict(verdict) | {"line": verdict.line.to_json()}
            # a line of its own even after one that a killed run left unfinished
            stream.write(f"\n{json.dumps(fields)}\n")
            stream.flush()
            verdicts.append(verdict)
            progress.set_postfix_str(f"{len(verdicts)}/{len(paths)} shards", refresh=False)
            progress.update(verdict.line.size_bytes)
    return sorted(verdicts, key=lambda verdict: verdict.line.name)


def _check_shard(task: _Task) -> Verdict:
    stat, before = task.path.stat(), task.before
    is_known = before is not None and before.rules == RULES and before.size_bytes == stat.st_size and not task.again
    if before is not None and is_known and sha256_of(task.path) == before.sha256:
        return Verdict(before, stat.st_mtime_ns, decoded=False, differs=False)
    line = inspect_shard(task.path)
    differs = before is not None and (before.size_bytes, before.sha256) != (line.size_bytes, line.sha256)
    if before is not None and not differs and line.samples == before.samples:
        line = dataclasses.replace(line, edition=before.edition)
    return Verdict(line, stat.st_mtime_ns, decoded=True, differs=differs)


def inspect_shard(path: Path) -> Shard:
    """Read one shard to its end, or to the damage, and judge each of its samples."""
    samples = TarSamples(path)
    problems: dict[str, str | None] = {}
    occurrences, unusual = Counter[str](), Counter[str]()
    for sample in samples:
        problems[sample.key] = _problem(sample)
        if problems[sample.key] is None:
            count_unusual(sample.members, unusual)
        occurrences[sample.key] += 1
    skipped: dict[str, list[str]] = {}
    for key, problem in sorted(problems.items()):
        # the manifest names samples by key, so one that occurs twice cannot be told apart from the other
        reason = "duplicate_key" if occurrences[key] > 1 else problem
        if reason is not None:
            skipped.setdefault(reason, []).extend([key] * occurrences[key])
    return Shard(
        name=path.name,
        samples=len(problems) - len({key for keys in skipped.values() for key in keys}),
        size_bytes=path.stat().st_size,
        sha256=sha256_of(path),
        skipped=skipped,
        truncated=samples.damage is not None,
        unknown_members=samples.unknown_members,
        damage=samples.damage or "",
        unusual=unusual,
    )


def _problem(sample: Sample) -> str | None:
    """Why a sample must not be trained on; None when nothing is wrong."""
    if sample.complaints:
        return min(sample.complaints)
    image = _picture(sample)
    if image is None:
        return "no_image"
    caption = sample.members.get("txt")
    if caption is None:
        return "no_caption"
    try:
        if not decode_text(caption):
            return "empty_caption"
        check_picture(image)
    except TextError:
        return "caption_not_utf8"
    except ImageTooLargeError:
        return "image_too_large"
    except ImageError:
        return "image_does_not_decode"
    return None


def _picture(sample: Sample) -> bytes | None:
    return next((content for kind, content in sample.members.items() if kind in IMAGE_TYPES), None)


def _read_notes(folder: Path) -> Iterator[Verdict]:
    for path in sorted(folder.glob("*.jsonl")):
        with path.open("rb") as stream:
            for text in stream:
                try:
                    fields = json.loads(text)
                    line = Shard.from_json(fields.pop("line"))
                    verdict = Verdict(line, **fields)
                except (ValueError, TypeError, KeyError, AttributeError):
                    continue  # a blank line, or one that a killed run left unfinished
                if line.rules == RULES:
                    yield verdict


def _repair(directory: Path, staged: Path, lines: Sequence[Shard], processes: int) -> list[Shard]:
    removals = [Removal(line, keep_original=line.truncated or not line.samples) for line in lines if not line.is_clean]
    if removals:
        step = {"step": "repair"}
        removed = rewrite_shards(directory, staged, removals, step, processes, count=len(removals))
        print(f"repaired {len(removals):,} shards: {removed:,} samples left out")
        kept = [removal.line.name for removal in removals if removal.keep_original]
        if kept:
            print(f"{len(kept):,} damaged shards are kept in {directory / QUARANTINE}: {_first_few(kept)}")
    return list(read_manifest(directory).shards)


def _totals(samples: int, shards: int, size_bytes: int) -> str:
    return f"{samples:,} usable samples in {shards:,} shard{'s' if shards != 1 else ''}, {size_bytes / 1e6:,.1f} MB"


def _print_problems(lines: Sequence[Shard], missing: Sequence[str], differing: Sequence[str]) -> None:
    places: dict[str, list[str]] = {}
    for line in lines:
        for reason, keys in line.skipped.items():
            places.setdefault(reason, []).extend(f"{line.name}:{key}" for key in keys)
    rows = [
        (reason, f"{len(found):,}", _first_few(found))
        for reason, found in sorted(places.items(), key=lambda item: -len(item[1]))
    ]
    for problem, shards in (
        *_damaged(lines),
        ("missing shard", missing),
        ("other than the manifest said", differing),
    ):
        if shards:
            rows.append((problem, f"{len(shards):,}", _first_few(shards)))
    unknown = [line.name for line in lines if line.unknown_members]
    if unknown:
        count = sum(line.unknown_members for line in lines)
        rows.append(("unknown member (ignored)", f"{count:,}", _first_few(unknown)))
    if rows:
        print_table(("problem", "count", "first of them"), rows)
    unusual = sum((Counter(line.unusual) for line in lines), Counter[str]())
    if unusual:
        print_table(
            ("picture that other readers may see otherwise", "count"), [(why, f"{n:,}") for why, n in unusual.items()]
        )
        print("`data-prep reshard --normalise` writes these as every reader sees them")


def _damaged(lines: Sequence[Shard]) -> list[tuple[str, list[str]]]:
    """What is wrong with tars that cannot be read to their end, and with which."""
    names: dict[str, list[str]] = {}
    for line in lines:
        if line.truncated:
            names.setdefault(f"truncated shard ({line.damage})" if line.damage else "truncated shard", []).append(
                line.name
            )
    return sorted(names.items())


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:EXAMPLES_SHOWN]) + (", …" if len(names) > EXAMPLES_SHOWN else "")


def _print_verdict(
    lines: Sequence[Shard], missing: Sequence[str], differing: Sequence[str], max_bad_ratio: float
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
