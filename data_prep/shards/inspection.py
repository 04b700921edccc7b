"""Judging one shard: every sample is read, every image decoded to its end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from data_prep.shards.manifest import ShardLine
from formats.files import sha256_of
from formats.pictures import ImageError, ImageTooLargeError, check_image
from formats.tar import IMAGE_TYPES, Sample, TarSamples


def inspect_shard(path: Path) -> ShardLine:
    """Read one shard to its end, or to the damage, and judge each of its samples."""
    samples = TarSamples(path)
    problems: dict[str, str | None] = {}
    occurrences = Counter[str]()
    for sample in samples:
        problems[sample.key] = _problem(sample)
        occurrences[sample.key] += 1
    skipped: dict[str, list[str]] = {}
    for key, problem in sorted(problems.items()):
        # the manifest names samples by key, so one that occurs twice cannot be told apart from the other
        reason = "duplicate_key" if occurrences[key] > 1 else problem
        if reason is not None:
            skipped.setdefault(reason, []).extend([key] * occurrences[key])
    return ShardLine(
        shard=path.name,
        samples=len(problems) - len({key for keys in skipped.values() for key in keys}),
        size_bytes=path.stat().st_size,
        sha256=sha256_of(path),
        skipped=skipped,
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
