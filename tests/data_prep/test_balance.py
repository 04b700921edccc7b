"""Rates of clusters: what was asked for is what is read, to one sample; large clusters are thinned."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from cluster_material import make_features
from hypothesis import given, settings
from hypothesis import strategies as st
from make_shards import picture

from data_prep.__main__ import main
from data_prep.balancing import published_rates
from data_prep.balancing.published_rates import read_rate_list
from data_prep.balancing.rates import StoredRates, effective_number, fill
from data_prep.commands import options
from formats.arrays import write_array
from formats.balance import MAX_RATE, read_balance
from formats.clusters import read_clusters
from formats.errors import UserError
from formats.manifest import read_manifest

SIZES = [40, 31, 25]
NAN_ROWS = (7, 50)

cluster_sizes = st.lists(st.integers(0, 5000), min_size=1, max_size=40).filter(any).map(np.array)


@given(cluster_sizes, st.floats(0, 1), st.floats(0, 1), st.sampled_from([1.0, 3.0, MAX_RATE]))
def test_rates_are_those_of_a_patient_search(
    sizes_C: npt.NDArray[np.int64], alpha: float, keep: float, highest: float
) -> None:
    budget = keep * highest * float(sizes_C.sum())
    rates_C = fill(sizes_C, alpha, budget, highest)
    n_C = np.maximum(sizes_C, 1).astype(float)
    low, high = 0.0, highest * float(n_C.max())
    for _ in range(200):
        middle = (low + high) / 2
        read = (np.minimum(highest, middle * n_C ** (alpha - 1)) * sizes_C).sum()
        low, high = (middle, high) if read < budget else (low, middle)
    expected_C = np.where(sizes_C > 0, np.minimum(highest, high * n_C ** (alpha - 1)), 0)
    np.testing.assert_allclose(rates_C, expected_C, rtol=1e-7, atol=1e-12)
    assert (rates_C * sizes_C).sum() == pytest.approx(budget, rel=1e-9)


@given(cluster_sizes, st.floats(0, 1), st.floats(0.001, 1))
def test_rates_fall_and_readings_rise_with_size(sizes_C: npt.NDArray[np.int64], alpha: float, keep: float) -> None:
    rates_C = fill(sizes_C, alpha, keep * float(sizes_C.sum()), 1.0)
    order = np.argsort(sizes_C[sizes_C > 0])
    ordered_C = rates_C[sizes_C > 0][order]
    assert (np.diff(ordered_C) <= 1e-12).all()
    assert (np.diff(ordered_C * sizes_C[sizes_C > 0][order]) >= -1e-9).all()


def test_alpha_1_is_uniform_and_alpha_0_flattens() -> None:
    sizes_C = np.array([1000, 10, 400, 90])
    np.testing.assert_allclose(fill(sizes_C, 1, 0.3 * 1500, 1.0), 0.3)
    np.testing.assert_allclose(fill(sizes_C, 0, 40, 1.0) * sizes_C, 10)
    np.testing.assert_allclose(fill(sizes_C, 0, 310, 1.0) * sizes_C, [105, 10, 105, 90])  # two are read whole
    assert effective_number(np.array([5.0, 5.0, 0.0])) == pytest.approx(2)


def test_the_highest_rate_of_the_command_is_that_of_the_format() -> None:
    assert options.MAX_RATE == MAX_RATE


@pytest.mark.parametrize("budget", [-1, 1500.5])
def test_a_budget_that_cannot_be_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        fill(np.array([1000, 500]), 0.2, budget, 1.0)


@settings(max_examples=60)
@given(cluster_sizes, st.floats(0, 1), st.floats(0.01, 1), st.sampled_from([1.0, MAX_RATE]), st.integers(1, 9))
def test_stored_rates_sum_up_to_the_budget(
    sizes_C: npt.NDArray[np.int64], alpha: float, keep: float, highest: float, shards: int
) -> None:
    budget = keep * float(sizes_C.sum())
    rates_C = fill(sizes_C, alpha, budget, highest)
    cluster_N = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes_C), dtype=np.int32), sizes_C))
    stored = StoredRates(rates_C, sizes_C, highest)
    rates_N = np.concatenate([stored.of(part_n) for part_n in np.array_split(cluster_N, shards)])
    assert float(rates_N.max()) <= highest
    # the last of its clusters that is not at the highest rate is off by less than half a step
    assert abs(rates_N.astype(np.float64).sum() - budget) <= 1
    for cluster in np.flatnonzero(sizes_C).tolist():
        of_cluster_n = rates_N[cluster_N == cluster].astype(np.float64)
        step = float(np.spacing(np.float16(rates_C[cluster])))
        assert np.abs(of_cluster_n - rates_C[cluster]).max() <= step
        assert abs(of_cluster_n.sum() - sizes_C[cluster] * rates_C[cluster]) <= 2 * step


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(shards, clusters)"""
    pytest.importorskip("faiss")
    folder = tmp_path_factory.mktemp("material")
    shards, embeddings = make_features(folder, SIZES, NAN_ROWS)
    command = ["clusters", str(embeddings), f"--shards={shards}", f"--output={folder / 'clusters'}", "--clusters=8"]
    assert main([*command, "--processes=1"]) == 0
    return shards, folder / "clusters"


def test_a_balance_of_clusters(tmp_path: Path, material: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shards, directory = material
    output = tmp_path / "balance"
    assert main(["balance", str(directory), f"--output={output}", "--keep=0.4"]) == 2
    assert "2 samples of" in (error := capsys.readouterr().err)
    assert "--default 0 leaves them out" in error
    assert not output.exists()
    assert main(["balance", str(directory), f"--output={output}", "--keep=0.4", "--default=0"]) == 0
    manifest, clusters = read_manifest(shards), read_clusters(directory)
    balance = read_balance(output, manifest)
    assert balance.summary["achieved_share"] == pytest.approx(0.4, abs=1e-3 / sum(SIZES))
    assert balance.summary["samples"] == sum(SIZES)
    rates_N = np.concatenate([balance.rates(number) for number in range(len(SIZES))])
    cluster_N = np.concatenate([clusters.of(shard) for shard in manifest.shards])
    assert (rates_N[list(NAN_ROWS)] == 0).all()
    mean_C = [float(rates_N[cluster_N == c].astype(float).mean()) for c in range(len(clusters.sizes_C))]
    np.testing.assert_allclose(mean_C, fill(clusters.sizes_C, 0.2, 0.4 * sum(SIZES), 1.0), atol=1e-3)
    assert balance.summary["clusters_at_one"] == sum(mean >= 1 for mean in mean_C)
    before, after = balance.summary["effective_clusters"].values()
    assert before < after
    assert "read per epoch" in capsys.readouterr().out


def test_repeats_reach_shares_above_one(tmp_path: Path, material: tuple[Path, Path]) -> None:
    shards, directory = material
    options = [f"--output={tmp_path / 'balance'}", "--keep=1.5", "--default=1"]
    assert main(["balance", str(directory), *options]) == 2
    assert main(["balance", str(directory), *options, "--repeat"]) == 0
    balance = read_balance(tmp_path / "balance", read_manifest(shards))
    assert balance.summary["achieved_share"] == pytest.approx(1.5, abs=1e-3 / sum(SIZES))
    assert float(balance.rates(0).max()) > 1


def test_a_published_list(tmp_path: Path, material: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shards, _ = material
    rates = {hashlib.sha256(picture(number)).hexdigest(): round(number / 200, 6) for number in range(sum(SIZES))}
    missing = hashlib.sha256(picture(33)).hexdigest()
    listed = tmp_path / "rates.json"
    rates[hashlib.sha256(b"a picture of somebody else").hexdigest()] = 0.5
    del rates[missing]
    listed.write_text(json.dumps(rates, indent=2))
    command = ["balance", f"--from-list={listed}", f"--shards={shards}", f"--output={tmp_path / 'balance'}"]
    assert main([*command, "--processes=1"]) == 2
    assert "no rate for 1 of 96 samples (one is 000000033 in 00000.tar)" in capsys.readouterr().err
    assert main([*command, "--processes=1", "--default=1"]) == 0
    balance = read_balance(tmp_path / "balance", read_manifest(shards))
    rates_N = np.concatenate([balance.rates(number) for number in range(len(SIZES))])
    expected_N = np.arange(sum(SIZES)) / 200
    expected_N[33] = 1
    np.testing.assert_array_equal(rates_N, expected_N.astype(np.float16))
    assert balance.summary["without_rate"] == 1


@pytest.mark.parametrize("block_bytes", [7, 100, 1 << 24])
def test_a_list_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(published_rates, "_BLOCK_BYTES", block_bytes)
    digests = [hashlib.sha256(bytes([number])).hexdigest() for number in range(20)]
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(dict.fromkeys(digests, 0.25))[:-1] + f', "{digests[3].upper()}": 1e-1}}')
    identity_N, rate_N = read_rate_list(path)
    assert identity_N.tolist() == sorted(int(digest[:16], 16) for digest in digests)
    assert sorted(set(rate_N.tolist())) == [float(np.float16(0.1)), 0.25]
    assert (rate_N == 0.25).sum() == 19


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"000000001": 0.5}', "no JSON object of SHA-256 and rate"),
        (f'{{"{"a" * 64}": 0.5.5}}', "a rate that is no number"),
        (f'{{"{"a" * 64}": -1}}', "not from 0 to 256"),
        (f'{{"{"a" * 64}": NaN}}', "no JSON object of SHA-256 and rate"),
        ("{}", "is empty"),
        ("", "is empty"),
    ],
)
def test_what_is_no_list(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "rates.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        read_rate_list(tmp_path / "rates.json")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "name CLUSTERS"),
        (["--from-list=rates.json"], "takes --shards DIR"),
        (["nowhere"], "has no clusters.json"),
    ],
)
def test_what_is_left_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(["balance", f"--output={tmp_path / 'balance'}", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_an_array_of_another_size_is_refused(tmp_path: Path, material: tuple[Path, Path]) -> None:
    for path in material[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_array(tmp_path / "00002.npy", np.zeros(3, np.int32))
    assert main(["balance", str(tmp_path), f"--output={tmp_path / 'balance'}", "--default=0"]) == 2
    assert not (tmp_path / "balance").exists()
