"""Files and folders that a crash never leaves half-made under their final names, and JSON that is JSON."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from formats.errors import UserError

HASH_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name next to `path`; if the block ends well, what is there is flushed and takes its place.

    Otherwise it is removed. Of several writers at once the last one counts; readers see the old content or the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield temporary
        flush_to_disk(temporary)  # or a power loss could leave the name without the content
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def building(directory: Path, overwrite: bool) -> Iterator[Path]:
    """Give a fresh folder `DIRECTORY.partial`; rename it to `directory` if the block ends well, else remove it.

    A killed build leaves its `.partial` folder, which the next one replaces.

    Raises UserError when `directory` has content and `overwrite` is false.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name a folder to write to")
    if not overwrite and directory.is_dir() and any(directory.iterdir()):
        raise UserError(f"{directory} is not empty: choose another folder or pass --overwrite")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # the old content goes only now that the new one is whole
    if directory.exists():
        shutil.rmtree(directory)
    partial.replace(directory)


def expand(location: str) -> str:
    """A path with `~` and `~user` at its beginning as the home it means; a URL (`s3://…`) as it is."""
    return location if "://" in location else os.path.expanduser(location)  # noqa: PTH111 (pathlib's is no pure text)


def path_argument(text: str) -> Path:
    """A path on a command line, argparse's `type=`; an empty one, as of a variable that is not set, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path is empty: is a variable not set?")
    return Path(expand(text))


def location_argument(text: str) -> str:
    """A path or a URL on a command line, argparse's `type=`."""
    return expand(text)


def make_folder(folder: Path) -> Path:
    """Make a folder unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file so that readers see the old content or the new, never a part; text as UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def to_json(value: Any, indent: int | None = None, default: Callable[[Any], Any] | None = None) -> str:
    """JSON as RFC 8259 has it: a float that is not finite, which it cannot say, is null; `default` is json's."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=default)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=default)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, readable, atomically."""
    write_atomically(path, to_json(value, indent=2) + "\n")


def write_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_atomically(path, "".join(to_json(value) + "\n" for value in values))


def read_text(path: Path) -> str:
    """A text in UTF-8, with or without byte order mark. Raises UserError that names the line where it is not."""
    return utf8(path.read_bytes(), str(path))


def utf8(content: bytes, name: str) -> str:
    """The same of what a file called `name` holds."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} line {line} is not UTF-8 text: save it as UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError for anything else in the file, OSError if it cannot be read."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): mend it, or restore it") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: mend it, or restore it")
    return value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read what `write_json_lines` wrote; an absent file is an empty list. Raises UserError for a damaged one."""
    if not path.exists():
        return []
    values = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            value = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: mend or delete it") from error
        if not isinstance(value, dict):
            raise UserError(f"{path} line {number} is not a JSON object: mend or delete it")
        if value:
            values.append(value)
    return values


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def flush_to_disk(path: Path) -> None:
    """fsync an existing file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
