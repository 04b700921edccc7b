"""Features of the pictures of a shard directory: `00000.npy` for 00000.tar, and in embeddings.json what they are.

A folder of such arrays alone, made elsewhere, is taken as well: rows must be those of the manifest, in its order. A row
that is not finite is of a picture without features, as one that does not decode.

n rows of a shard, D width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.arrays import array_path, map_array
from formats.errors import UserError
from formats.files import read_json, write_json
from formats.manifest import Manifest, Shard

HEADER = "embeddings.json"
FORMAT_VERSION = 1
_MOST_NAMED = 3


@dataclasses.dataclass(frozen=True)
class EmbeddingsHeader:
    """What gave the features, of which data, and their form.

    weights_sha256: of the model, "" where it is not known
    manifest_sha256: formats.manifest.Manifest's
    """

    model: str
    weights_sha256: str
    manifest_sha256: str
    width: int
    rows: int
    dtype: str = "float16"
    normalised: bool = True
    format_version: int = FORMAT_VERSION


def claim_folder(directory: Path, header: EmbeddingsHeader) -> None:
    """Write the header, or raise UserError where the folder holds features of another model or of other data."""
    path = directory / HEADER
    given = dataclasses.asdict(header)
    if not path.exists():
        write_json(path, given)
    elif differing := [name for name, value in read_json(path).items() if name in given and given[name] != value]:
        raise UserError(f"{path} is of other features ({', '.join(differing)} differ): name another --output")


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Features that were looked over: there are rows for every sample of every shard. `header`: {} if there is none."""

    directory: Path
    shards: Sequence[Shard]
    width: int
    header: Mapping[str, Any]

    def rows(self, shard: Shard) -> npt.NDArray[np.floating[Any]]:
        """The features of a shard [n, D], mapped into memory, as they were stored."""
        return map_array(array_path(self.directory, shard))


def open_embeddings(directory: Path, manifest: Manifest) -> Embeddings:
    """The features of a shard directory; of arrays the headers alone are read.

    Raises UserError for a shard without features, for another number of rows than the manifest says, for widths that
    differ, and for what is no array of floats or of other data.
    """
    header = read_json(directory / HEADER) if (directory / HEADER).exists() else {}
    if header.get("manifest_sha256", manifest.sha256) != manifest.sha256:
        raise UserError(
            f"{directory / HEADER} is of another manifest than {manifest.directory} has: the shards changed since; "
            "embed them again"
        )
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory: name the --output of pipeline/embed.py")
    missing = [shard.name for shard in manifest.shards if not array_path(directory, shard).is_file()]
    if missing:
        names = f"{', '.join(missing[:_MOST_NAMED])}{', …' if len(missing) > _MOST_NAMED else ''}"
        raise UserError(
            f"{directory} lacks the features of {len(missing):,} of {len(manifest.shards):,} shards ({names}): run "
            "pipeline/embed.py again, with every --slice"
        )
    widths = set(_checked_widths(directory, manifest.shards))
    if len(widths) != 1:
        raise UserError(f"{directory} holds features of widths {sorted(widths)}: they must be of one model")
    return Embeddings(directory, manifest.shards, widths.pop(), header)


def _checked_widths(directory: Path, shards: Sequence[Shard]) -> Iterator[int]:
    for shard in shards:
        path = array_path(directory, shard)
        rows_nD = map_array(path)
        if rows_nD.ndim != 2 or rows_nD.dtype.kind != "f":
            raise UserError(f"{path} is {rows_nD.dtype} of {rows_nD.ndim} axes, not a float for each row and column")
        if len(rows_nD) != shard.samples:
            raise UserError(
                f"{path} has {len(rows_nD):,} rows and {shard.url} {shard.samples:,} usable samples: they do not fit"
            )
        yield rows_nD.shape[1]
