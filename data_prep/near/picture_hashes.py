"""The perceptual hashes of whole directories, computed once per shard and kept in files."""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.console import progress_bar
from data_prep.near.perceptual_hash import HASH_VERSION, hash_pictures, shrink
from data_prep.parallel import map_in_processes
from formats.errors import UserError
from formats.files import replacing, sha256_of
from formats.manifest import Shard, read_manifest, usable_samples
from formats.pictures import ImageError, check_picture
from formats.tar import IMAGE_TYPES, TarSamples


@dataclasses.dataclass(frozen=True)
class PictureFile:
    """A shard, a tar of an evaluation set, or its folder of pictures: `line` only for the first.

    `identity` names the content: the hashes of an equal file are not computed again.
    """

    directory: Path
    name: str
    identity: str
    size_bytes: int
    line: Shard | None = dataclasses.field(default=None, compare=False)

    def pictures(self) -> Iterator[tuple[str, bytes]]:
        """(key or file name, encoded picture), in order."""
        path = self.directory / self.name
        if path.is_dir():
            for file in _picture_files(path):
                yield file.name, file.read_bytes()
            return
        of_tar = TarSamples(path, IMAGE_TYPES)
        for sample in of_tar if self.line is None else usable_samples(self.directory, self.line, IMAGE_TYPES):
            for content in sample.members.values():
                yield sample.key, content


def shard_files(directory: Path) -> list[PictureFile]:
    """The shards of a verified directory; raises UserError if it is not verified."""
    return [
        PictureFile(directory, line.name, line.sha256, line.size_bytes, line)
        for line in read_manifest(directory).shards
    ]


def evaluation_files(directory: Path) -> list[PictureFile]:
    """The pictures of an evaluation set (docs/formats.md) or of another shard directory; raises UserError if none."""
    if (directory / "images").is_dir():
        files = _picture_files(directory / "images")
        identity = hashlib.sha256()
        for file in files:
            identity.update(f"{file.name}\0{sha256_of(file)}\0".encode("utf-8", "replace"))
        size_bytes = sum(file.stat().st_size for file in files)
        return [PictureFile(directory, "images", identity.hexdigest(), size_bytes)]
    folder = directory / "test" if (directory / "test").is_dir() else directory
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"no pictures in {directory}: expected test/*.tar, images/ or *.tar")
    # unlike those of a shard of ours with the same content, its samples have not been sifted
    return [PictureFile(folder, path.name, f"all-{sha256_of(path)}", path.stat().st_size) for path in tars]


class PictureHashes:
    """The hashes of several files, one after the other, and what each place stands for."""

    def __init__(self, files: Sequence[PictureFile], folder: Path, processes: int) -> None:
        self.files = files
        self._folder = folder
        self._keys = functools.lru_cache(maxsize=256)(self._read_keys)  # mapped files
        folder.mkdir(parents=True, exist_ok=True)
        missing = {file.identity: file for file in files if not self._path(file).exists()}
        with progress_bar("hash", sum(file.size_bytes for file in missing.values()), "B") as progress:
            write = functools.partial(_write_hashes, folder)
            for size_bytes in map_in_processes(write, missing.values(), processes, limit=len(missing)):
                progress.update(size_bytes)
        counts = [len(self._load(file)) for file in files]
        self.starts: list[int] = [0, *np.cumsum(counts, dtype=np.int64).tolist()]

    def write_all(self, path: Path) -> npt.NDArray[np.uint64]:
        """All hashes [N] as one file, mapped into memory; raises UserError if there are none."""
        if not self.starts[-1]:
            raise UserError("there is no picture to compare")
        hashes_N = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint64, shape=(self.starts[-1],))
        for number, file in enumerate(self.files):
            hashes_N[self.starts[number] : self.starts[number + 1]] = self._load(file)
        return hashes_N

    def locate(self, place: int) -> tuple[PictureFile, str]:
        """The file in which the picture at `place` is, and its key."""
        number = bisect.bisect_right(self.starts, place) - 1
        return self.files[number], self.key(number, place - self.starts[number])

    def key(self, number: int, index: int) -> str:
        """The key of a picture by the number of its file and its index there."""
        return bytes(self._keys(self.files[number].identity)[index]).decode("utf-8")

    def _read_keys(self, identity: str) -> npt.NDArray[np.bytes_]:
        keys_M: npt.NDArray[np.bytes_] = np.load(self._folder / f"{identity}.keys.npy", mmap_mode="r")
        return keys_M

    def _load(self, file: PictureFile) -> npt.NDArray[np.uint64]:
        hashes_N: npt.NDArray[np.uint64] = np.load(self._path(file), mmap_mode="r")
        return hashes_N

    def _path(self, file: PictureFile) -> Path:
        return _hash_file(self._folder, file)


def _write_hashes(folder: Path, file: PictureFile) -> int:
    keys, pictures = [], []
    for key, data in file.pictures():
        try:
            if file.line is None:  # nobody has verified it
                check_picture(data)
            pictures.append(shrink(data))
        except ImageError:
            continue
        keys.append(key.encode())
    # the hashes come last: they say that both files are there
    _save(folder / f"{file.identity}.keys.npy", np.array(keys, np.bytes_))
    _save(_hash_file(folder, file), hash_pictures(pictures))
    return file.size_bytes


def _hash_file(folder: Path, file: PictureFile) -> Path:
    return folder / f"{file.identity}.v{HASH_VERSION}.npy"


def _save(path: Path, array: npt.NDArray[np.generic]) -> None:
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, array)


def _picture_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in IMAGE_TYPES)
