"""BALANCE: how often each sample of a shard directory is read per epoch, a column of 16-bit rates beside its manifest.

    00000.npy  00001.npy  …   float16 [n], one a shard and named as it is: the rate of each usable sample, in order
    balance.json              of which manifest, and what the rates come to; written last

A rate is 0.3, say: in three epochs of ten the sample comes once; above 1 it comes several times in some. Every float16
is a whole number of 2^-24, so that sums of rates are exact whatever a rate was before it was rounded to 16 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import UserError
from formats.files import building, read_json, write_json
from formats.manifest import Manifest, Shard

FORMAT_VERSION = 1
SUMMARY = "balance.json"
MAX_RATE = 256.0
RATE_UNITS = 1 << 24  # to 1: every float16 is so many parts of it
_SMALLEST_RATE = 1 / RATE_UNITS
_DTYPE = np.dtype("<f2")
_RATES = np.arange(np.float16(MAX_RATE).view(np.uint16) + 1, dtype=np.uint16).view(np.float16)  # all that there are


@dataclass(frozen=True)
class Balance:
    """A rate for each sample of a manifest.

    shards: those of the manifest, in its order
    summary: what balance.json says
    sha256: of all rates in the manifest's order
    samples_by_rate: how many have each rate; the index is the rate's 16 bits, which rise with it
    """

    directory: Path
    shards: tuple[Shard, ...] = field(repr=False)
    summary: Mapping[str, Any]
    sha256: str
    samples_by_rate: np.ndarray = field(repr=False)

    @property
    def drawn_per_epoch(self) -> Fraction:
        """Sum of all rates: how many samples an epoch has on average."""
        return _sum_of_rates(self.samples_by_rate)

    @property
    def max_rate(self) -> float:
        """The largest rate of all."""
        return float(_RATES[np.flatnonzero(self.samples_by_rate)[-1]])

    @property
    def thirds(self) -> tuple[float, float]:
        """The rates up to which a sample is in the third that is thinned most, and up to which it is in the next."""
        up_to = np.cumsum(self.samples_by_rate)
        first, second = np.searchsorted(up_to, [up_to[-1] / 3, up_to[-1] * 2 / 3])
        return float(_RATES[first]), float(_RATES[second])

    def rates(self, shard_number: int) -> np.ndarray:
        """float16 [n] of a shard, memory-mapped: no process has pages of its own, and no file stays open.

        Raises UserError for a file that is not there, or not a rate for each sample of the shard.
        """
        return _map_rates(self.directory, self.shards[shard_number])


def write_balance(
    directory: Path,
    manifest: Manifest,
    rates_by_shard: Iterable[np.ndarray],
    summary: Mapping[str, Any],
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a folder whole or not at all; returns the content of balance.json.

    rates_by_shard: [n] of any float type, of each shard in the manifest's order; one is in memory at a time. They are
        rounded to 16 bits, those above 0 to no less than 2^-24
    summary: `clusters` and `clusters_at_one`, and what else is to be kept; `samples`, `achieved_share` (mean rate, as
        stored) and the hashes are added

    Raises UserError for a folder with content unless `overwrite`, and ValueError for rates that are none.
    """
    digest, samples_by_rate = hashlib.sha256(), np.zeros(len(_RATES), np.int64)
    with building(directory, overwrite) as partial:
        for shard, rates in zip(manifest.shards, rates_by_shard, strict=True):
            stored = _to_16_bits(rates)
            if stored.shape != (shard.samples,) or (fault := _fault(stored)):
                found = f"rates of shape {stored.shape}" if stored.shape != (shard.samples,) else fault
                raise ValueError(f"{shard.name} has {shard.samples} samples, and {found}")
            np.save(partial / _file_name(shard), stored, allow_pickle=False)
            digest.update(stored.tobytes())
            samples_by_rate += _count_by_rate(stored)
        content = {
            "format_version": FORMAT_VERSION,
            "manifest_sha256": manifest.sha256,
            "rates_sha256": digest.hexdigest(),
            "samples": manifest.num_samples,
            "achieved_share": float(_sum_of_rates(samples_by_rate)) / max(1, manifest.num_samples),
            **summary,
        }
        write_json(partial / SUMMARY, content)
    return content


def read_balance(directory: str | Path, manifest: Manifest) -> Balance:
    """Check a folder against the manifest of the shards that are read by it; its files are mapped when they are used.

    Raises UserError for one that is of another manifest, or lacks a shard's file, or has rates that are none.
    """
    directory = Path(directory)
    if not (directory / SUMMARY).is_file():
        raise UserError(f"{directory} has no {SUMMARY}: make it with `data-prep balance`")
    summary = read_json(directory / SUMMARY)
    if summary.get("manifest_sha256") != manifest.sha256:
        raise UserError(
            f"{directory} is the balance of other shards than {manifest.directory} (manifest_sha256 "
            f"{str(summary.get('manifest_sha256'))[:12]}, there {manifest.sha256[:12]}): make it again with "
            "`data-prep balance`"
        )
    digest, samples_by_rate = hashlib.sha256(), np.zeros(len(_RATES), np.int64)
    for shard in manifest.shards:
        rates = _map_rates(directory, shard)
        if fault := _fault(rates):
            raise UserError(f"{directory / _file_name(shard)} holds {fault}: make it again with `data-prep balance`")
        digest.update(rates.data)
        counts = np.bincount(rates.view(np.uint16))
        samples_by_rate[: len(counts)] += counts
    sha256 = digest.hexdigest()
    if summary.get("rates_sha256", sha256) != sha256:
        raise UserError(f"{directory} changed since it was made: make it again with `data-prep balance`")
    return Balance(directory, manifest.shards, summary, sha256, samples_by_rate)


def _to_16_bits(rates: np.ndarray) -> np.ndarray:
    rates = np.where(rates > 0, np.maximum(rates, _SMALLEST_RATE), rates)
    return (rates + 0.0).astype(_DTYPE)  # minus zero becomes zero


def _count_by_rate(rates: np.ndarray) -> np.ndarray:
    return np.bincount(rates.view(np.uint16), minlength=len(_RATES))


def _sum_of_rates(samples_by_rate: np.ndarray) -> Fraction:
    units = (_RATES.astype(np.float64) * RATE_UNITS).astype(np.int64)
    return Fraction(int((samples_by_rate * units).sum()), RATE_UNITS)  # up to 2^31 samples at 256, exactly


def _map_rates(directory: Path, shard: Shard) -> np.ndarray:
    path = directory / _file_name(shard)
    header = _header(shard.samples)
    try:
        with path.open("rb") as file:
            if file.read(len(header)) == header:  # as nearly always: reading it as any header takes longer than mapping
                return np.memmap(file, _DTYPE, "r", len(header), (shard.samples,))
        rates: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: make {directory} again with `data-prep balance`") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is not an array of numpy's ({error}): make it again") from error
    if rates.dtype != _DTYPE or rates.shape != (shard.samples,):
        raise UserError(
            f"{path} is {rates.dtype} {list(rates.shape)}, not float16 [{shard.samples}] as {shard.name} has samples: "
            "make it again with `data-prep balance`"
        )
    return rates


def _header(samples: int) -> bytes:
    """What a .npy file with so many rates begins with (NEP 1, version 1.0, as numpy pads it)."""
    fields = f"{{'descr': '<f2', 'fortran_order': False, 'shape': ({samples},), }}"
    return b"\x93NUMPY\x01\x00v\x00" + fields.ljust(117).encode() + b"\n"


def _fault(rates: np.ndarray) -> str:
    """What keeps 16-bit floats from being rates; "" for nothing."""
    bits = rates.view(np.uint16)  # of floats that are not negative the order is that of their bits
    if not len(bits) or bits.max() <= np.float16(MAX_RATE).view(np.uint16):
        return ""
    if np.isnan(rates).any():
        return "a rate that is not a number"
    if np.signbit(rates).any():
        return "a negative rate"
    return f"a rate above {MAX_RATE:g}"


def _file_name(shard: Shard) -> str:
    return f"{shard.name.removesuffix('.tar')}.npy"
