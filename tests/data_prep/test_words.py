"""Words of captions by the size of the clusters that they occur in, against a loop."""

from __future__ import annotations

import io
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.shards.verify import verify
from data_prep.shards.words import WordCounts, count_words
from data_prep.shards.writer import ShardWriter
from formats.errors import UserError
from formats.files import write_json
from formats.word_counts import read_word_frequencies

CAPTIONS = ["a red dog", "a dog, dog", "a cat", "a wet cat", "an owl", "a red owl"]
CLUSTER = [0, 0, 1, 0, -1, 2]  # -1: a picture without features
SIZES = [300, 20, 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shards` of three samples each, and their `clusters`."""
    folder = tmp_path_factory.mktemp("words")
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(stream, "JPEG")
    with ShardWriter(folder / "shards", samples_per_shard=3) as writer:
        for number, caption in enumerate(CAPTIONS):
            writer.write(f"{number}", {"jpg": stream.getvalue(), "txt": caption.encode()})
    verify(folder / "shards", processes=1, max_bad_ratio=0.0)
    (folder / "clusters").mkdir()
    shutil.copy(folder / "shards" / "manifest.jsonl", folder / "clusters")
    for name, array in (("00000", CLUSTER[:3]), ("00001", CLUSTER[3:])):
        np.save(folder / "clusters" / f"{name}.npy", np.array(array, np.int32))
    np.save(folder / "clusters" / "sizes.npy", np.array(SIZES))
    write_json(folder / "clusters" / "clusters.json", {"format_version": 1})
    return folder


def test_a_word_has_the_mean_size_of_the_clusters_that_it_occurs_in(folder: Path) -> None:
    count_words(folder / "shards", folder / "words.json", 2, processes=1, clusters_folder=folder / "clusters")
    found = read_word_frequencies(str(folder / "words.json"))
    logs = defaultdict(list)
    for caption, cluster in zip(CAPTIONS, CLUSTER, strict=True):
        for word in caption.replace(",", "").split():
            if cluster >= 0:
                logs[word].append(math.log(SIZES[cluster]))
    expected = {word: math.exp(sum(logs[word]) / len(logs[word])) for word in found.frequencies}
    assert set(expected) == {"a", "dog", "red", "cat", "owl"}  # seen twice
    assert found.cluster_sizes == pytest.approx(expected, rel=2e-3)


def test_sums_are_those_of_memory_when_words_go_to_files(tmp_path: Path) -> None:
    counts = WordCounts(tmp_path, most_in_memory=1)
    pieces = [{"dog": 3, "cat": 0}, {"cat": 5}, {"dog": 1, "owl": 7}]
    for piece in pieces:
        counts.add(piece)  # type: ignore[arg-type]
    assert list(counts) == [("cat", 5), ("dog", 4), ("owl", 7)]


def test_clusters_of_other_shards_are_refused(folder: Path, tmp_path: Path) -> None:
    clusters = shutil.copytree(folder / "clusters", tmp_path / "clusters")
    lines = (clusters / "manifest.jsonl").read_text().splitlines()
    (clusters / "manifest.jsonl").write_text(f"{lines[0]}\n")
    with pytest.raises(UserError, match="has clusters of other shards than"):
        count_words(folder / "shards", tmp_path / "words.json", 1, processes=1, clusters_folder=clusters)
    assert not (tmp_path / "words.json").exists()
