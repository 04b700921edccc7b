"""Rates of samples: what is written is read, sums are exact, and what does not fit the shards is refused in a line."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from formats.balance import read_balance, write_balance
from formats.errors import UserError
from formats.files import read_json, write_json
from formats.manifest import Manifest, Shard

SIZES = (5, 0, 70)
MANIFEST = Manifest("shards", tuple(Shard(f"{n:05d}.tar", size, 0, "") for n, size in enumerate(SIZES)), "ab" * 32)
CLUSTERS = {"clusters": 3, "clusters_at_one": 1}


def random_rates(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(0, 2, size) for size in SIZES]


def test_what_is_written_is_read_and_its_share_is_exact(tmp_path: Path) -> None:
    rates = random_rates()
    rates[0][:2] = 0, 1e-12
    summary = write_balance(tmp_path / "balance", MANIFEST, iter(rates), CLUSTERS)
    balance = read_balance(tmp_path / "balance", MANIFEST)
    stored = [balance.rates(number) for number in range(len(SIZES))]
    for given, found in zip(rates, stored, strict=True):
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, given, rtol=2**-11, atol=2**-24)
    assert stored[0][0] == 0 < stored[0][1], "what is asked for, however seldom, is not lost"
    exact = sum(Fraction(float(rate)) for rates in stored for rate in rates) / sum(SIZES)
    assert summary["achieved_share"] == float(exact)
    assert balance.summary == summary == read_json(tmp_path / "balance" / "balance.json")
    assert summary.items() >= {"samples": 75, **CLUSTERS}.items()


def test_facts_of_all_rates_are_exact(tmp_path: Path) -> None:
    write_balance(tmp_path / "balance", MANIFEST, random_rates(), CLUSTERS)
    balance = read_balance(tmp_path / "balance", MANIFEST)
    rates = np.sort(np.concatenate([balance.rates(number) for number in range(len(SIZES))]))
    assert balance.drawn_per_epoch == sum(Fraction(float(rate)) for rate in rates)
    assert balance.max_rate == rates[-1]
    assert balance.thirds == (rates[24], rates[49]), "25 of 75 samples have a rate up to the first"


def _replaced(values: list[float], dtype: str = "<f2") -> Callable[[Path], None]:
    return lambda folder: np.save(folder / "00000.npy", np.array(values, dtype))


def _of_another_manifest(folder: Path) -> None:
    write_json(folder / "balance.json", {**read_json(folder / "balance.json"), "manifest_sha256": "cd" * 32})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "00002.npy").unlink(), "00002.npy is missing"),
        (lambda folder: (folder / "00002.npy").write_bytes(b"no array"), "00002.npy is not an array"),
        (lambda folder: (folder / "balance.json").unlink(), "has no balance.json"),
        (lambda folder: os.truncate(folder / "00002.npy", 200), "00002.npy is not an array"),
        (_replaced([0.5] * 6), r"00000.npy is float16 \[6\], not float16 \[5\]"),
        (_replaced([0.5] * 5, "<f4"), r"00000.npy is float32 \[5\]"),
        (_replaced([0.5, 0.5, np.nan, 0.5, 0.5]), "00000.npy holds a rate that is not a number"),
        (_replaced([0.5, -0.25, 0, 0, 0]), "00000.npy holds a negative rate"),
        (_replaced([0.5, np.inf, 0, 0, 0]), "00000.npy holds a rate above 256"),
        (_replaced([0.5] * 5), "changed since it was made"),
        (_of_another_manifest, "is the balance of other shards than shards"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_a_line(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    write_balance(tmp_path / "balance", MANIFEST, random_rates(), CLUSTERS)
    damage(tmp_path / "balance")
    with pytest.raises(UserError, match=message) as error:
        read_balance(tmp_path / "balance", MANIFEST)
    assert "\n" not in str(error.value)


def test_rates_that_are_none_are_not_written(tmp_path: Path) -> None:
    for wrong in (np.full(5, np.nan), np.full(5, -0.5), np.full(5, 300.0), np.full(4, 0.5)):
        with pytest.raises(ValueError, match=r"00000\.tar has 5 samples"):
            write_balance(tmp_path / "balance", MANIFEST, [wrong, *random_rates()[1:]], CLUSTERS)
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"


def test_a_header_of_another_writer_is_read(tmp_path: Path) -> None:
    write_balance(tmp_path / "balance", MANIFEST, random_rates(), CLUSTERS)
    before = read_balance(tmp_path / "balance", MANIFEST)
    with (tmp_path / "balance" / "00002.npy").open("r+b") as file:
        rates = np.array(before.rates(2))
        np.lib.format.write_array(file, rates, version=(2, 0), allow_pickle=False)
    assert read_balance(tmp_path / "balance", MANIFEST).sha256 == before.sha256


def test_another_writer_may_leave_out_what_is_not_needed(tmp_path: Path) -> None:
    rates = random_rates()
    write_balance(tmp_path / "balance", MANIFEST, rates, CLUSTERS)
    write_json(tmp_path / "balance" / "balance.json", {"manifest_sha256": MANIFEST.sha256})
    before = read_balance(tmp_path / "balance", MANIFEST).sha256
    rates[2][3] *= 1.01
    write_balance(tmp_path / "balance", MANIFEST, rates, CLUSTERS, overwrite=True)
    assert read_balance(tmp_path / "balance", MANIFEST).sha256 != before
