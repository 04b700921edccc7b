"""A folder on any file system that fsspec knows, whose files appear whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import fsspec

from formats.files import to_json


class Folder:
    """Files by name in one folder, local or remote; made when the first file is written."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._filesystem, self._path = fsspec.core.url_to_fs(self.url)

    def exists(self, name: str = "") -> bool:
        """Whether the file, or the folder itself, is there."""
        return bool(self._filesystem.exists(self._full(name)))

    def names(self) -> list[str]:
        """What is in the folder; nothing if it is not there."""
        if not self.exists():
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in self._filesystem.ls(self._path, detail=False))

    def is_file(self) -> bool:
        """Whether a file has the folder's name."""
        return bool(self._filesystem.isfile(self._path))

    def read(self, name: str) -> BinaryIO:
        """Open a file for reading; it can seek."""
        stream: BinaryIO = self._filesystem.open(self._full(name), "rb")
        return stream

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """Write a file that gets its name only if the block ends well."""
        self._filesystem.makedirs(self._path, exist_ok=True)
        temporary = self._full(f".{name}.{os.getpid()}.part")
        try:
            with self._filesystem.open(temporary, "wb") as stream:
                yield stream
            self._filesystem.mv(temporary, self._full(name))
        finally:
            if self._filesystem.exists(temporary):
                self._filesystem.rm(temporary)

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `write_json` wrote."""
        with self.read(name) as stream:
            value: dict[str, Any] = json.load(stream)
        return value

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """One JSON object, indented."""
        with self.writing(name) as stream:
            stream.write((to_json(value, indent=2) + "\n").encode())

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        if self.exists(name):
            self._filesystem.rm(self._full(name))

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        if self.exists():
            self._filesystem.rm(self._path, recursive=True)

    def move_to(self, other: Folder) -> None:
        """Become `other`, in place of what is there; both on the same file system."""
        other.remove()
        self._filesystem.mv(self._path, other._path, recursive=True)

    def _full(self, name: str) -> str:
        return f"{self._path}/{name}" if name else str(self._path)


def parent_and_name(url: str) -> tuple[Folder, str]:
    """The folder that a file is in, and its name there."""
    filesystem, path = fsspec.core.url_to_fs(url)
    parent, _, name = path.rpartition("/")
    return Folder(filesystem.unstrip_protocol(parent or "/")), name
