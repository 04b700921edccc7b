"""Check every sample of a shard directory and write its manifest."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import multiprocessing
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_prep.console import print_table, progress_bar
from data_prep.errors import UserError
from data_prep.files import read_json_lines, sha256_of, write_json, write_json_lines
from data_prep.images import ImageError, ImageTooLargeError, check_image
from data_prep.tar_reader import IMAGE_TYPES, Sample, TarSamples

FORMAT_VERSION = 1
MANIFEST = "manifest.jsonl"
DATASET = "dataset.json"
PROVENANCE = "provenance.jsonl"  # one line per step that made the directory, written by download and pack
EXAMPLES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class ShardReport:
    """What one shard holds: `samples` usable ones, and the others as key -> reason."""

    shard: str
    samples: int
    size_bytes: int
    sha256: str
    skipped: dict[str, str]
    skipped_samples: int  # more than len(skipped) where a key occurs twice
    truncated: bool
    unknown_members: int

    def manifest_line(self) -> dict[str, Any]:
        """The shard's line of `manifest.jsonl`; absent `skip` and `truncated` mean none and no."""
        line: dict[str, Any] = {
            "shard": self.shard,
            "samples": self.samples,
            "bytes": self.size_bytes,
            "sha256": self.sha256,
        }
        if self.skipped:
            line["skip"] = sorted(self.skipped)
        if self.truncated:
            line["truncated"] = True
        return line


def verify(directory: Path, processes: int, max_bad_ratio: float) -> bool:
    """Read every shard of `directory`, decode every image, write `manifest.jsonl` and `dataset.json`.

    Prints a table of the problems. Returns whether the directory is fit for training: no shard truncated, at
    least one usable sample, and a share of unusable samples of at most `max_bad_ratio`.

    Raises UserError for a directory that is missing or holds no shard.
    """
    paths = find_shards(directory)
    reports = _inspect_all(paths, processes)
    write_json_lines(directory / MANIFEST, (report.manifest_line() for report in reports))
    dataset = _summary(reports, source=read_json_lines(directory / PROVENANCE))
    # dataset.json comes last: it describes a manifest that is already there
    write_json(directory / DATASET, dataset)
    _print_summary(directory, reports, dataset)
    return _print_verdict(reports, max_bad_ratio)


def find_shards(directory: Path) -> list[Path]:
    """The directory's tars in the order of their names; raises UserError when there are none."""
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: name the folder that holds 00000.tar, 00001.tar, …")
    paths = sorted(directory.glob("*.tar"))
    if not paths:
        raise UserError(f"{directory} holds no *.tar: make shards with `data-prep download` or `data-prep pack`")
    return paths


def inspect_shard(path: Path) -> ShardReport:
    """Read one shard to its end and judge each of its samples."""
    samples = TarSamples(path)
    good: set[str] = set()
    skipped: dict[str, str] = {}
    total = 0
    for sample in samples:
        total += 1
        problem = _problem(sample)
        if sample.key in good or sample.key in skipped:
            # the manifest names samples by key, so neither of the two can be told apart from the other
            problem = "duplicate_key"
            good.discard(sample.key)
        if problem is None:
            good.add(sample.key)
        else:
            skipped[sample.key] = problem
    return ShardReport(
        shard=path.name,
        samples=len(good),
        size_bytes=path.stat().st_size,
        sha256=sha256_of(path),
        skipped=skipped,
        skipped_samples=total - len(good),
        truncated=samples.truncated,
        unknown_members=samples.unknown_members,
    )


def _problem(sample: Sample) -> str | None:
    """Why a sample must not be trained on; None when nothing is wrong."""
    if sample.complaints:
        return min(sample.complaints)
    image = next((content for kind, content in sample.members.items() if kind in IMAGE_TYPES), None)
    if image is None:
        return "no_image"
    caption = sample.members.get("txt")
    if caption is None:
        return "no_caption"
    try:
        if not caption.decode("utf-8").strip():
            return "empty_caption"
        check_image(image)
    except UnicodeDecodeError:
        return "caption_not_utf8"
    except ImageTooLargeError:
        return "image_too_large"
    except ImageError:
        return "image_does_not_decode"
    return None


def _inspect_all(paths: Sequence[Path], processes: int) -> list[ShardReport]:
    total_bytes = sum(path.stat().st_size for path in paths)
    with progress_bar("verify", total_bytes, "B") as progress:
        reports = []
        for report in _inspect_in_any_order(paths, min(processes, len(paths))):
            reports.append(report)
            progress.set_postfix_str(f"{len(reports)}/{len(paths)} shards", refresh=False)
            progress.update(report.size_bytes)
    return sorted(reports, key=lambda report: report.shard)


def _inspect_in_any_order(paths: Sequence[Path], processes: int) -> Iterator[ShardReport]:
    if processes == 1:
        yield from map(inspect_shard, paths)
        return
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(inspect_shard, path) for path in paths]):
                yield future.result()
        except BrokenProcessPool as error:
            raise UserError("a verify process was killed (out of memory?): use fewer --processes") from error


def _summary(reports: Sequence[ShardReport], source: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "samples": sum(report.samples for report in reports),
        "shards": len(reports),
        "bytes": sum(report.size_bytes for report in reports),
        "skipped": dict(sorted(_skipped_by_reason(reports).items())),
        "unknown_members": sum(report.unknown_members for report in reports),
        "truncated_shards": [report.shard for report in reports if report.truncated],
        "source": source,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("cluster-clip", "pillow", "simplejpeg")},
        },
    }


def _skipped_by_reason(reports: Sequence[ShardReport]) -> Counter[str]:
    counts = Counter(reason for report in reports for reason in report.skipped.values())
    # a key that occurs n times is one entry but n samples
    extra = sum(report.skipped_samples - len(report.skipped) for report in reports)
    return counts + Counter({"duplicate_key": extra})


def _print_summary(directory: Path, reports: Sequence[ShardReport], dataset: dict[str, Any]) -> None:
    shards = f"{len(reports):,} shard{'s' if len(reports) > 1 else ''}"
    print(f"{directory}: {dataset['samples']:,} usable samples in {shards}, {dataset['bytes'] / 1e6:,.1f} MB")
    examples: dict[str, list[str]] = {}
    for report in reports:
        for key, reason in sorted(report.skipped.items()):
            examples.setdefault(reason, []).append(f"{report.shard}:{key}")
    rows = [
        (reason, f"{count:,}", _first_few(examples[reason]))
        for reason, count in sorted(dataset["skipped"].items(), key=lambda item: -item[1])
    ]
    truncated = dataset["truncated_shards"]
    if truncated:
        rows.append(("truncated shard", f"{len(truncated):,}", _first_few(truncated)))
    unknown = [report.shard for report in reports if report.unknown_members]
    if unknown:
        rows.append(("unknown member (ignored)", f"{dataset['unknown_members']:,}", _first_few(unknown)))
    if rows:
        print_table(("problem", "count", "first of them"), rows)


def _first_few(names: Sequence[str]) -> str:
    return ", ".join(names[:EXAMPLES_SHOWN]) + (", …" if len(names) > EXAMPLES_SHOWN else "")


def _print_verdict(reports: Sequence[ShardReport], max_bad_ratio: float) -> bool:
    usable = sum(report.samples for report in reports)
    bad = sum(report.skipped_samples for report in reports)
    failures = []
    if not usable:
        failures.append("no sample is usable")
    elif bad > max_bad_ratio * (usable + bad):
        share = bad / (usable + bad)
        failures.append(f"{share:.2%} of the samples are unusable, more than --max-bad-ratio {max_bad_ratio:.2%}")
    truncated = sum(report.truncated for report in reports)
    if truncated:
        failures.append(f"{truncated} truncated: make those shards again, or delete them and verify again")
    for failure in failures:
        print(f"not fit for training as it is: {failure} (the manifest is written all the same)")
    return not failures
