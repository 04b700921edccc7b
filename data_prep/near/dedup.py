"""Near-duplicate pictures within a shard directory, and pictures that evaluation sets hold too."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.console import print_table
from data_prep.near.dedup_page import Pair, write_page
from data_prep.near.near_duplicates import nearest_kept
from data_prep.near.picture_hashes import PictureHashes, evaluation_files, shard_files
from data_prep.shards.publish import changing, reading
from data_prep.shards.rewrite import Removal, check_removed, rewrite_shards
from formats.errors import UserError
from formats.files import replacing, write_json
from formats.manifest import MANIFEST, read_manifest

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Findings:
    """For each picture the earlier one that it is near to (-1: none), and their distance. The first `fixed` pictures
    are those of evaluation sets.
    """

    hashes: PictureHashes
    partner_N: npt.NDArray[np.int64]
    distance_N: npt.NDArray[np.uint8]
    fixed: int
    fixed_files: int

    def of_file(self, number: int) -> Iterator[tuple[int, int, int]]:
        """(index in the file, place of its partner, distance) of each duplicate in a file."""
        start, stop = self.hashes.starts[number : number + 2]
        for index in np.flatnonzero(self.partner_N[start:stop] >= 0).tolist():
            yield index, int(self.partner_N[start + index]), int(self.distance_N[start + index])

    def files_with_duplicates(self) -> list[int]:
        """The numbers of the shards that hold a duplicate."""
        numbers = range(self.fixed_files, len(self.hashes.files))
        return [number for number in numbers if next(self.of_file(number), None) is not None]


def dedup(
    directory: Path,
    against: Sequence[Path],
    output: Path,
    *,
    max_distance: int,
    remove: bool,
    max_removed: float,
    pictures: int,
    processes: int,
    memory_bytes: int,
) -> dict[str, Any]:
    """Find every usable sample whose picture differs in at most `max_distance` of 64 bits from one that is kept.

    Kept are the pictures of the sets in `against` and, of those near each other, the first. Writes into `output`
    summary.json, duplicates.jsonl and report.html with up to `pictures` pairs; returns the summary. With `remove`, the
    shards are rewritten without what was found.

    Raises UserError for a directory that is not verified or changed since, an unusable evaluation set, one in `against`
    that is the directory itself or a copy of it, or if more than `max_removed` of the pictures would be removed.
    """
    if output.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"--output {output} lies in the shard directory: choose another folder")
    for path in against:
        if path.resolve() == directory.resolve() or _holds_the_same(path, directory):
            raise UserError(f"--against {path} is {directory} itself, or a copy: every picture would be a duplicate")
    evaluation = [file for path in against for file in evaluation_files(path)]
    with changing(directory) if remove else reading(directory) as staged:
        shards = shard_files(directory)
        hashes = PictureHashes([*evaluation, *shards], output / "hashes", processes)
        hashes_N = hashes.write_all(output / "hashes" / "all.npy")
        fixed = hashes.starts[len(evaluation)]
        partner_N, distance_N = nearest_kept(hashes_N, fixed, max_distance, output / "hashes", memory_bytes)
        findings = Findings(hashes, partner_N, distance_N, fixed, len(evaluation))
        numbers = findings.files_with_duplicates()
        summary = _summarize(findings, numbers, max_distance, against)
        _write_list(findings, numbers, output / "duplicates.jsonl")
        write_page(output / "report.html", directory.resolve().name, summary, _choose(findings, numbers, pictures))
        write_json(output / "summary.json", summary)
        _print(summary, output)
        if staged is not None:
            found = summary["near_evaluation"] + summary["near_training"]
            check_removed(found, summary["pictures"], max_removed)
            step = {"step": "dedup", "max_distance": max_distance, "against": [path.name for path in against]}
            removed = rewrite_shards(directory, staged, _removals(findings, numbers), step, processes, len(numbers))
            print(f"{directory}: {removed:,} samples removed, {len(numbers):,} shards rewritten")
    return summary


def _holds_the_same(path: Path, directory: Path) -> bool:
    manifests = [folder / MANIFEST for folder in (path, directory)]
    if not all(manifest.is_file() for manifest in manifests):
        return False
    first, second = ({shard.sha256 for shard in read_manifest(manifest.parent).shards} for manifest in manifests)
    return bool(first & second - {""})


def _summarize(
    findings: Findings, numbers: Sequence[int], max_distance: int, against: Sequence[Path]
) -> dict[str, Any]:
    counts: dict[str, Counter[int]] = {"evaluation": Counter(), "training": Counter()}
    for number in numbers:
        for _, partner, distance in findings.of_file(number):
            counts["evaluation" if partner < findings.fixed else "training"][distance] += 1
    return {
        "format_version": FORMAT_VERSION,
        "pictures": len(findings.partner_N) - findings.fixed,
        "evaluation_pictures": findings.fixed,
        "against": [path.name for path in against],
        "max_distance": max_distance,
        "near_evaluation": counts["evaluation"].total(),
        "near_training": counts["training"].total(),
        "by_distance": {kind: dict(sorted(of_kind.items())) for kind, of_kind in counts.items()},
    }


def _removals(findings: Findings, numbers: Sequence[int]) -> Iterator[Removal]:
    for number in numbers:
        line = findings.hashes.files[number].line
        assert line is not None  # only evaluation files have none
        yield Removal(line, frozenset(findings.hashes.key(number, index) for index, _, _ in findings.of_file(number)))


def _write_list(findings: Findings, numbers: Sequence[int], path: Path) -> None:
    """One line per duplicate: which sample, near to which, by how many bits."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for number in numbers:
            shard = findings.hashes.files[number].name
            for index, partner, distance in findings.of_file(number):
                file, key = findings.hashes.locate(partner)
                # of a training picture the shard, of an evaluation picture where it lies
                near = file.name if partner >= findings.fixed else str(file.directory / file.name)
                line = {
                    "shard": shard,
                    "key": findings.hashes.key(number, index),
                    "distance": distance,
                    "near": near,
                    "near_key": key,
                }
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")


def _choose(findings: Findings, numbers: Sequence[int], pictures: int) -> list[Pair]:
    """At most `pictures` pairs to look at, drawn evenly from each kind and distance; the most doubtful come first."""
    rng = random.Random(0)
    groups: dict[tuple[bool, int], list[tuple[int, int, int]]] = {}  # a reservoir for each
    seen = Counter[tuple[bool, int]]()
    for number in numbers:
        start = findings.hashes.starts[number]
        for index, partner, distance in findings.of_file(number):
            group = (partner >= findings.fixed, distance)
            reservoir = groups.setdefault(group, [])
            seen[group] += 1
            if len(reservoir) < pictures:
                reservoir.append((start + index, partner, distance))
            elif (slot := rng.randrange(seen[group])) < pictures:
                reservoir[slot] = (start + index, partner, distance)
    # first one of each group, then a second of each, …
    rounds = itertools.zip_longest(*(groups[group] for group in sorted(groups)))
    chosen = [pair for each in rounds for pair in each if pair is not None][:pictures]
    return [
        Pair(findings.hashes.locate(place), findings.hashes.locate(partner), distance, partner < findings.fixed)
        for place, partner, distance in sorted(chosen, key=lambda pair: (pair[1] >= findings.fixed, -pair[2]))
    ]


def _print(summary: dict[str, Any], output: Path) -> None:
    print(f"{summary['pictures']:,} pictures, {summary['evaluation_pictures']:,} of evaluation sets")
    distances = sorted({*summary["by_distance"]["evaluation"], *summary["by_distance"]["training"]})
    rows = [
        (f"{distance}", *(f"{summary['by_distance'][kind].get(distance, 0):,}" for kind in ("training", "evaluation")))
        for distance in distances
    ]
    rows.append(("all", f"{summary['near_training']:,}", f"{summary['near_evaluation']:,}"))
    print_table(("bits that differ", "near an earlier one", "near an evaluation picture"), rows)
    print(output / "report.html")
