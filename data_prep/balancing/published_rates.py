"""`data-prep balance --from-list`: a published list, JSON of a rate for each picture's SHA-256, however long.

N entries of the list, n samples of a shard
"""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.balancing.identities import Identities, look_up, of_sha256, of_shard
from data_prep.console import progress_bar
from data_prep.parallel import map_in_processes
from data_prep.shards.publish import reading
from formats.arrays import array_path, map_array, write_array
from formats.balance import MAX_RATE, write_balance
from formats.errors import UserError
from formats.files import make_folder, sha256_of
from formats.manifest import Shard, read_manifest

_BLOCK_BYTES = 1 << 24
_ENTRY = re.compile(rb'"([0-9a-fA-F]{64})"\s*:\s*([0-9.eE+-]+)')
_BETWEEN = b" \t\r\n,{}"
_IDENTITIES, _RATES = "identities.npy", "rates.npy"


def balance_from_list(
    list_file: Path, directory: Path, output: Path, *, default: float | None, processes: int, overwrite: bool
) -> dict[str, Any]:
    """Write the rates that a list has for the samples of a verified directory; `default`: of those that it lacks.

    Returns what balance.json says. Raises UserError for what is no such list, and for a sample without a rate.
    """
    with reading(directory), tempfile.TemporaryDirectory(prefix=".list.", dir=make_folder(output.parent)) as name:
        scratch = Path(name)
        manifest = read_manifest(directory)
        identity_N, rate_N = read_rate_list(list_file)
        write_array(scratch / _IDENTITIES, identity_N)
        write_array(scratch / _RATES, rate_N)
        find = functools.partial(_find, directory, scratch)
        missing, example = 0, ""
        with progress_bar("look up", manifest.num_samples, "") as progress:
            for samples, lacking, key in map_in_processes(find, manifest.shards, processes, len(manifest.shards)):
                missing, example = missing + lacking, example or key
                progress.update(samples)
        if missing and default is None:
            raise UserError(
                f"{list_file} has no rate for {missing:,} of {manifest.num_samples:,} samples (one is {example}): "
                "--default 0 leaves them out, another --default reads them as often as it says"
            )
        summary = {
            "clusters": None,
            "clusters_at_one": None,
            "list": list_file.name,
            "list_sha256": sha256_of(list_file),
            "default": default,
            "without_rate": missing,
        }
        rates = (_with_default(map_array(array_path(scratch, shard)), default) for shard in manifest.shards)
        written = write_balance(output, manifest, rates, summary, overwrite)
    print(
        f"{output}: {written['achieved_share']:.6f} of {written['samples']:,} samples per epoch; {missing:,} are not "
        "in the list"
    )
    return written


def read_rate_list(path: Path) -> tuple[Identities, npt.NDArray[np.float16]]:
    """The entries of a list, by identity [N]; of two for one picture the later counts. Read in blocks.

    Raises UserError for what is no JSON object of SHA-256 and rate.
    """
    identities, rates = [np.zeros(0, np.uint64)], [np.zeros(0, np.float16)]
    with progress_bar("read list", path.stat().st_size, "B") as progress:
        for block in _blocks_of_entries(path):
            entries = _ENTRY.findall(block)
            if rest := _ENTRY.sub(b"", block).translate(None, _BETWEEN):
                raise UserError(f"{path} is no JSON object of SHA-256 and rate: it has {rest[:60].decode('latin-1')!r}")
            identities.append(of_sha256(digest.decode() for digest, _ in entries))
            rates.append(_checked(path, [rate for _, rate in entries]))
            progress.update(len(block))
    identity_N, rate_N = np.concatenate(identities), np.concatenate(rates)
    if not len(identity_N):
        raise UserError(f"{path} is empty: it must be a JSON object of SHA-256 and rate")
    order = np.argsort(identity_N, kind="stable")
    identity_N, rate_N = identity_N[order], rate_N[order]
    is_last_N = np.append(identity_N[1:] != identity_N[:-1], True)
    return identity_N[is_last_N], rate_N[is_last_N]


def _blocks_of_entries(path: Path) -> Iterator[bytes]:
    """The file in pieces that end between entries."""
    rest = b""
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            whole, comma, rest = (rest + block).rpartition(b",")
            yield whole + comma
    yield rest


def _checked(path: Path, texts: list[bytes]) -> npt.NDArray[np.float16]:
    try:
        rate_n = np.array(texts, "S32").astype(np.float64)
    except ValueError as error:
        raise UserError(f"{path} has a rate that is no number: {error}") from error
    if not ((rate_n >= 0) & (rate_n <= MAX_RATE)).all():
        raise UserError(f"{path} has a rate that is not from 0 to {MAX_RATE:g}")
    return rate_n.astype(np.float16)


def _find(directory: Path, scratch: Path, shard: Shard) -> tuple[int, int, str]:
    """Write the rates of a shard, NaN for a sample without; how many there are, and are without, and one of these."""
    identity_N, rate_N = map_array(scratch / _IDENTITIES), map_array(scratch / _RATES)
    rate_n = np.full(shard.samples, np.nan, np.float16)
    example = ""
    for row, (key, identities) in enumerate(of_shard(directory, shard, "sha256")):
        place = look_up(identities, identity_N)
        if place >= 0:
            rate_n[row] = rate_N[place]
        else:
            example = f"{key} in {shard.name}"
    write_array(array_path(scratch, shard), rate_n)
    return shard.samples, int(np.isnan(rate_n).sum()), example


def _with_default(rate_n: npt.NDArray[np.float16], default: float | None) -> npt.NDArray[np.float16]:
    return np.where(np.isnan(rate_n), np.float16(default or 0.0), rate_n)
