"""The files of which evaluation sets are made, read with one clear line for whatever is not as it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from formats.errors import UserError
from pipeline.evaluation.tar_samples import TarSample, read_tar_samples


def split_samples(split: Path) -> list[TarSample]:
    """Samples of every shard that the split's nshards.txt promises, no more and no fewer; else UserError."""
    count_file = split / "nshards.txt"
    text = read_text(count_file, "the number of shards 0.tar, 1.tar, … beside it").strip()
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise UserError(f"{count_file} must hold a positive integer, the number of shards; it holds {text!r}")
    found = len(list(split.glob("*.tar")))
    if found > int(text):
        raise UserError(f"{split} holds {found} tars, but nshards.txt says {text}: some would not be evaluated")
    samples = [sample for shard in range(int(text)) for sample in read_tar_samples(split / f"{shard}.tar")]
    if not samples:
        raise UserError(f"the shards in {split} hold no samples")
    return samples


def read_lines(file: Path) -> tuple[str, ...]:
    """The lines of a list, none of them blank, at least one; else UserError."""
    lines = [line.strip() for line in read_text(file, "one entry per line").rstrip().splitlines()]
    if not lines:
        raise UserError(f"{file} is empty: expected one entry per line")
    if "" in lines:
        number = lines.index("") + 1
        raise UserError(f"{file}, line {number} is blank: fill or remove it (a class is the number of its line)")
    return tuple(lines)


def read_text(file: Path, expectation: str) -> str:
    """A file of UTF-8; UserError if it is missing, saying what was expected of it, or is something else."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"missing {file}: expected {expectation}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object; UserError for anything else."""
    try:
        content = json.loads(read_text(file, "a JSON object"))
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold a JSON object")
    return content
