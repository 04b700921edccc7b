"""Clusters of features: what they find, that they are the same whoever does the work, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cluster_material import GROUPS, groups_of, make_features
from hypothesis import given, settings
from hypothesis import strategies as st
from small_browser import CHROMIUM, open_browser

from data_prep.__main__ import main
from data_prep.balancing.kmeans import draw_sample, merge_near, unit_rows
from formats.clusters import read_clusters
from formats.embeddings import open_embeddings
from formats.errors import UserError
from formats.manifest import read_manifest

SIZES = [40, 31, 25, 30]
NAN_ROWS = (7, 50)

pytest.importorskip("faiss")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_features(tmp_path_factory.mktemp("material"), SIZES, NAN_ROWS)


def clusters_command(material: tuple[Path, Path], output: Path, *more: str) -> int:
    shards, embeddings = material
    options = ["--clusters=12", "--seed=3", "--processes=1", *more]
    return main(["clusters", str(embeddings), f"--shards={shards}", f"--output={output}", *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> Path:
    output = tmp_path_factory.mktemp("made") / "clusters"
    assert clusters_command(material, output) == 0
    return output


def arrays(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.glob("*.npy")}


def test_groups_are_found_and_counted(made: Path, material: tuple[Path, Path]) -> None:
    clusters = read_clusters(made)
    cluster_N = np.concatenate([clusters.of(shard) for shard in clusters.manifest.shards])
    group_N = groups_of(sum(SIZES))
    assert np.flatnonzero(cluster_N == -1).tolist() == list(NAN_ROWS)
    has_features_N = cluster_N >= 0
    # one cluster for each group: the 12 centroids were merged to as many
    assert len(set(zip(cluster_N[has_features_N].tolist(), group_N[has_features_N].tolist(), strict=True))) == GROUPS
    assert clusters.sizes_C.tolist() == [int((cluster_N == c).sum()) for c in range(GROUPS)]
    assert clusters.summary["without_cluster"] == len(NAN_ROWS)
    assert (clusters.summary["clusters"], len(clusters.summary["merged"])) == (GROUPS, 12 - GROUPS)
    assert clusters.manifest == read_manifest(made)
    assert clusters.manifest.sha256 == read_manifest(material[0]).sha256


def test_every_sample_is_with_the_nearest_centroid(tmp_path: Path, material: tuple[Path, Path]) -> None:
    assert clusters_command(material, tmp_path / "clusters", "--merge-similarity=1") == 0
    clusters = read_clusters(tmp_path / "clusters")
    centroids_CD = clusters.centroids().astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(centroids_CD, axis=1), 1, atol=1e-6)
    assert len(centroids_CD) == 12
    for shard in clusters.manifest.shards:
        rows_nD = np.load(material[1] / f"{shard.name[:5]}.npy").astype(np.float64)
        cosines_nC = rows_nD @ centroids_CD.T / np.linalg.norm(rows_nD, axis=1, keepdims=True)
        usable = clusters.of(shard) >= 0
        chosen = cosines_nC[usable, clusters.of(shard)[usable]]
        np.testing.assert_allclose(chosen, cosines_nC[usable].max(axis=1), atol=1e-6)


@pytest.mark.slow
def test_slices_and_processes_change_nothing(tmp_path: Path, made: Path, material: tuple[Path, Path]) -> None:
    output = tmp_path / "clusters"
    assert clusters_command(material, output, "--slice=0/2") == 2
    assert clusters_command(material, output, "--centroids-only") == 0
    assert clusters_command(material, output, "--slice=1/2") == 0
    assert not (output / "clusters.json").exists()
    before = (output / "00001.npy").stat().st_mtime_ns
    (output / "00000.npy").write_bytes(b"cut short")
    assert clusters_command(material, output, "--processes=2") == 0
    assert (output / "00001.npy").stat().st_mtime_ns == before
    assert arrays(output) == arrays(made)
    assert (output / "clusters.json").read_bytes() == (made / "clusters.json").read_bytes()
    assert (output / "clusters.html").read_bytes() == (made / "clusters.html").read_bytes()


def test_the_page_shows_members(made: Path) -> None:
    page = (made / "clusters.html").read_text()
    assert page.count("data:image/jpeg") == sum(min(6, size) for size in read_clusters(made).sizes_C.tolist())
    assert "What was merged" in page
    assert "The largest" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
def test_the_page_in_a_browser(tmp_path: Path, made: Path) -> None:
    with open_browser(tmp_path / "profile") as page:
        for width in (1280, 400):
            page.show(made / "clusters.html", width, "dark")
            assert page.run("document.documentElement.scrollWidth") <= width
            assert page.run("[...document.images].every(image => image.naturalWidth > 0)")
            assert page.methods("Log.entryAdded") == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--clusters=500"], "--clusters 500 is more than the 124 pictures with features"),
        (["--slice=0/2"], "has no centroids yet"),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, material: tuple[Path, Path], capsys: pytest.CaptureFixture[str], change: list[str], expected: str
) -> None:
    assert clusters_command(material, tmp_path / "clusters", *change) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert expected in error


def test_other_clusters_and_missing_features_are_refused(
    tmp_path: Path, made: Path, material: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert clusters_command(material, made, "--seed=4") == 2
    assert "seed differ" in capsys.readouterr().err
    (tmp_path / "00000.npy").write_bytes((material[1] / "00000.npy").read_bytes())
    assert clusters_command((material[0], tmp_path), tmp_path / "clusters") == 2
    assert "lacks the features of 3 of 4 shards" in capsys.readouterr().err


def test_without_faiss(
    tmp_path: Path, material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert clusters_command(material, tmp_path / "clusters") == 2
    assert "pip install 'cluster-clip[balance]'" in capsys.readouterr().err


def test_clusters_that_are_not_whole_are_refused(tmp_path: Path, made: Path) -> None:
    with pytest.raises(UserError, match=r"has no clusters\.json"):
        read_clusters(tmp_path)
    for path in made.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    clusters = read_clusters(tmp_path)
    np.save(tmp_path / "00000.npy", np.full(SIZES[0], GROUPS, np.int32))
    with pytest.raises(UserError, match="names clusters that there are not"):
        clusters.of(clusters.manifest.shards[0])
    (tmp_path / "00001.npy").unlink()
    with pytest.raises(UserError, match="is missing"):
        clusters.of(clusters.manifest.shards[1])
    summary: dict[str, Any] = json.loads((tmp_path / "clusters.json").read_text())
    assert summary["samples"] == sum(SIZES)


@pytest.mark.parametrize("most_rows", [1, 30, 10_000])
def test_a_sample_is_of_different_rows_that_have_features(
    tmp_path: Path, material: tuple[Path, Path], most_rows: int
) -> None:
    shards, directory = material
    embeddings = open_embeddings(directory, read_manifest(shards))
    sample_SD = draw_sample(embeddings, most_rows, 5, tmp_path / "a.npy")
    all_ND = np.concatenate([np.load(path) for path in sorted(directory.glob("*.npy"))])
    units_ND, usable_N = unit_rows(all_ND)
    known = {row.tobytes() for row in units_ND[usable_N].astype(np.float16)}
    drawn = {row.tobytes() for row in np.asarray(sample_SD)}
    assert drawn <= known
    assert len(drawn) == len(sample_SD)
    assert most_rows - len(NAN_ROWS) <= len(drawn) <= most_rows or drawn == known
    np.testing.assert_array_equal(sample_SD, draw_sample(embeddings, most_rows, 5, tmp_path / "b.npy"))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.floats(-0.2, 0.99), st.integers(0, 10_000))
def test_merging_is_greedy_from_the_largest_and_blind_to_numbers(count: int, similarity: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centroids_KD = unit_rows(rng.normal(size=(count, 3)))[0]
    rows_K = rng.integers(0, 4, count)  # many are of one size
    kept, merges = merge_near(centroids_KD, rows_K, similarity)
    slow: list[int] = []
    for number in sorted(range(count), key=lambda k: (-rows_K[k], centroids_KD[k].tobytes())):
        if all(float(centroids_KD[number] @ centroids_KD[other]) < similarity for other in slow):
            slow.append(number)
    assert kept == slow
    assert sorted([*kept, *(merge.centroid for merge in merges)]) == list(range(count))
    assert all(merge.cosine >= similarity - 1e-4 and rows_K[merge.into] >= rows_K[merge.centroid] for merge in merges)
    shuffled = rng.permutation(count)
    again, _ = merge_near(centroids_KD[shuffled], rows_K[shuffled], similarity)
    np.testing.assert_array_equal(centroids_KD[shuffled][again], centroids_KD[kept])


def test_merging_looks_across_blocks() -> None:
    rng = np.random.default_rng(0)
    some_KD = unit_rows(rng.normal(size=(1500, 64)))[0]
    kept, merges = merge_near(np.concatenate([some_KD, some_KD]), np.arange(3000)[::-1], 0.999)
    assert kept == list(range(1500))
    assert all(merge.centroid == merge.into + 1500 for merge in merges)
