"""`data-prep embeddings`: features that others computed, in clip-retrieval's layout -> those of a shard directory.

    img_emb/img_emb_0.npy  …              [m, D], any floats
    metadata/metadata_0.parquet  …        a row for each: image_path (or key), sha256, …

m rows of one of their files, M of all, n of a shard, D width
"""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from data_prep.balancing.identities import By, Identities, look_up, of_keys, of_sha256, of_shard
from data_prep.balancing.kmeans import unit_rows
from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import reading
from formats.arrays import array_path, map_array, write_array
from formats.embeddings import EmbeddingsHeader, claim_folder
from formats.errors import UserError
from formats.files import make_folder
from formats.manifest import Shard, read_manifest

_COLUMNS: dict[By, tuple[str, ...]] = {"key": ("image_path", "key"), "sha256": ("sha256",)}
_NUMBER = re.compile(r"img_emb_(\d+)\.npy")
_IDENTITIES, _PLACES, _STARTS = "identities.npy", "places.npy", "starts.npy"


def take_features(folder: Path, directory: Path, output: Path, *, by: By, model: str, processes: int) -> None:
    """Write an array for each shard of a verified directory (formats.embeddings), of the rows that are its samples'.

    Raises UserError for another layout, a sample without a row, and by key for a key that occurs twice.
    """
    files = _feature_files(folder)
    with reading(directory), tempfile.TemporaryDirectory(prefix=".match.", dir=make_folder(output)) as name:
        scratch, manifest = Path(name), read_manifest(directory)
        arrays = [_check_features(path) for path in files]
        widths = {array.shape[1] for array in arrays}
        if len(widths) != 1:
            raise UserError(f"{folder} holds features of widths {sorted(widths)}: they must be of one model")
        _write_index(folder, files, [len(array) for array in arrays], by, scratch)
        claim_folder(output, EmbeddingsHeader(model, "", manifest.sha256, widths.pop(), manifest.num_samples))
        take = functools.partial(_take, files, directory, scratch, output, by)
        lacking, example = 0, ""
        with progress_bar("match", manifest.num_samples, "") as progress:
            for samples, missing, key in map_in_processes(take, manifest.shards, processes, len(manifest.shards)):
                lacking, example = lacking + missing, example or key
                progress.update(samples)
    if lacking:
        raise UserError(
            f"{folder} has no features for {lacking:,} of {manifest.num_samples:,} samples (one is {example}): shards "
            "that lack some are not written; are they of these pictures, or to be matched --by the other?"
        )
    print(f"{output}: features of {manifest.num_samples:,} pictures in {len(manifest.shards):,} shards")


def _feature_files(folder: Path) -> list[Path]:
    matches = [(_NUMBER.fullmatch(path.name), path) for path in (folder / "img_emb").glob("*.npy")]
    files = sorted((int(match[1]), path) for match, path in matches if match)
    if not files:
        raise UserError(f"{folder} holds no img_emb/img_emb_0.npy: name the output folder of clip-retrieval inference")
    return [path for _, path in files]


def _check_features(path: Path) -> npt.NDArray[np.floating]:
    rows_mD = map_array(path)
    if rows_mD.ndim != 2 or rows_mD.dtype.kind != "f":
        raise UserError(f"{path} is {rows_mD.dtype} of {rows_mD.ndim} axes, not a float for each row and column")
    return rows_mD


def _write_index(folder: Path, files: list[Path], counts: list[int], by: By, scratch: Path) -> None:
    """What is looked up: identities of all rows in ascending order [M], their places, where each file starts."""
    parts = [_read_identities(folder, path, count, by) for path, count in zip(files, counts, strict=True)]
    identity_M = np.concatenate(parts)
    place_M = np.argsort(identity_M, kind="stable")
    identity_M = identity_M[place_M]
    if by == "key" and (repeated := int((identity_M[1:] == identity_M[:-1]).sum())):
        raise UserError(f"{folder} has {repeated:,} keys more than once: match --by sha256")
    write_array(scratch / _IDENTITIES, identity_M)
    write_array(scratch / _PLACES, place_M)
    write_array(scratch / _STARTS, np.cumsum([0, *counts]))


def _read_identities(folder: Path, features: Path, count: int, by: By) -> Identities:
    path = folder / "metadata" / features.name.replace("img_emb_", "metadata_").replace(".npy", ".parquet")
    if not path.is_file():
        raise UserError(f"{path} is missing: it says which pictures the rows of {features} are of")
    try:
        table = pq.ParquetFile(path)
        column = next((name for name in _COLUMNS[by] if name in table.schema_arrow.names), None)
        if column is None:
            raise UserError(f"{path} has no column {' or '.join(_COLUMNS[by])}: match --by the other")
        values = table.read(columns=[column]).column(0).to_pylist()
        identities = of_keys(values) if by == "key" else of_sha256(values)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # ArrowInvalid is a ValueError
        raise UserError(f"{path} cannot be used: {' '.join(str(error).split())}") from error
    if len(identities) != count:
        raise UserError(f"{path} has {len(identities):,} rows and {features} {count:,}: they do not fit")
    return identities


def _take(
    files: list[Path], directory: Path, scratch: Path, output: Path, by: By, shard: Shard
) -> tuple[int, int, str]:
    """Write a shard's features if there are some for each sample; samples, how many lack them, and one of these."""
    identity_M, place_M, starts = (map_array(scratch / name) for name in (_IDENTITIES, _PLACES, _STARTS))
    places, example, missing = [], "", 0
    for key, identities in of_shard(directory, shard, by):
        found = look_up(identities, identity_M)
        if found >= 0:
            places.append(int(place_M[found]))
        else:
            example, missing = f"{key} in {shard.name}", missing + 1
    if not missing:
        write_array(array_path(output, shard), _gather(files, np.array(places, np.int64), starts))
    return shard.samples, missing, example


def _gather(
    files: list[Path], place_n: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]
) -> npt.NDArray[np.float16]:
    """The rows at places among all files, of length 1; NaN for a row that has no direction."""
    number_n = np.searchsorted(starts, place_n, side="right") - 1
    rows_nD = np.empty((len(place_n), map_array(files[0]).shape[1]), np.float16)
    for number in np.unique(number_n).tolist():
        is_here_n = number_n == number
        units_mD, usable_m = unit_rows(map_array(files[number])[place_n[is_here_n] - starts[number]])
        units_mD[~usable_m] = np.nan
        rows_nD[is_here_n] = units_mD
    return rows_nD
