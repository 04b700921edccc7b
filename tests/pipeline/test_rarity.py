"""Accuracy by how rare a class is, against loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.errors import UserError
from formats.word_counts import WordFrequencies, read_word_frequencies
from pipeline.evaluation.tasks.intervals import means
from pipeline.evaluation.tasks.rarity import Rarity, accuracy_by_rarity, rarity_details, rarity_of_classes

THIRDS = ("rare", "medium", "frequent")


def rarity(frequencies: list[float]) -> Rarity:
    return Rarity("word_frequency", THIRDS, torch.tensor(frequencies, dtype=torch.float64))


def test_a_class_is_as_frequent_as_its_rarest_word() -> None:
    words = WordFrequencies({"dog": 0.5, "red": 0.25, "fox": 0.125, "o'clock": 0.0625}, "ab" * 32)
    names = ["Dog", "red fox", "fox-red dog", "red lynx", "o'clock", "…"]
    [by_word] = rarity_of_classes(names, words)
    assert by_word.frequency_C.tolist() == [0.5, 0.125, 0.125, 0.0, 0.0625, 0.0]


def test_a_class_is_in_the_clusters_of_its_rarest_word() -> None:
    sizes = {"dog": 900.0, "red": 5.0, "fox": 40.0}
    words = WordFrequencies({"dog": 0.5, "red": 0.25, "fox": 0.125}, "ab" * 32, sizes)
    by_word, by_cluster = rarity_of_classes(["dog", "red fox", "lynx"], words)
    assert by_cluster.frequency_C.tolist() == [900.0, 40.0, 0.0]
    assert by_word.third_C.tolist() == by_cluster.third_C.tolist() == [2, 1, 0]
    hits_N, labels_N = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 2])
    metrics = means(accuracy_by_rarity(hits_N, labels_N, [by_word, by_cluster]))
    clusters = {"acc1/tail_clusters": 1.0, "acc1/middle_clusters": 0.0, "acc1/head_clusters": 0.5}
    assert metrics == {"acc1/rare": 1.0, "acc1/medium": 0.0, "acc1/frequent": 0.5} | clusters


@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), min_size=1, max_size=30))
def test_thirds_follow_the_order_and_split_no_ties(frequencies: list[float]) -> None:
    third = rarity(frequencies).third_C.tolist()
    for first, one in zip(frequencies, third, strict=True):
        assert one == 3 * sum(other < first for other in frequencies) // len(frequencies)
    if len(set(frequencies)) == len(frequencies) >= 3:
        sizes = [third.count(part) for part in range(3)]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40))
def test_accuracy_of_each_third_equals_a_loop(samples: list[tuple[bool, int]]) -> None:
    hits_N = torch.tensor([float(hit) for hit, _ in samples])
    labels_N = torch.tensor([label for _, label in samples])
    metrics = means(accuracy_by_rarity(hits_N, labels_N, [rarity([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])]))
    expected = {}
    for third, name in enumerate(THIRDS):
        of_class = [[hit for hit, label in samples if label == of] for of in (2 * third, 2 * third + 1)]
        shares = [sum(hits) / len(hits) for hits in of_class if hits]
        if shares:
            expected[f"acc1/{name}"] = sum(shares) / len(shares)
    assert metrics == pytest.approx(expected)


def test_details_say_what_rare_means(tmp_path: Path) -> None:
    file = tmp_path / "words.json"
    content = {"format_version": 1, "captions": 5, "words": 10, "counts": {"dog": 5, "cat": 2, "owl": 1}}
    file.write_text(json.dumps(content | {"cluster_sizes": {"dog": 7.5, "cat": 2, "owl": 1}}))
    details = rarity_details(rarity_of_classes(["cat", "dog", "owl"], read_word_frequencies(str(file))))
    assert details["word_frequency"] == {
        "rare": {"classes": 1, "from": 0.1, "to": 0.1},
        "medium": {"classes": 1, "from": 0.2, "to": 0.2},
        "frequent": {"classes": 1, "from": 0.5, "to": 0.5},
    }
    assert details["cluster_size"]["head_clusters"] == {"classes": 1, "from": 7.5, "to": 7.5}
    file.write_text(json.dumps(content | {"cluster_sizes": {"dog": 0.5}}))
    with pytest.raises(UserError, match=r"is not a word-count file \(cluster_sizes\.dog: .*greater than or equal to 1"):
        read_word_frequencies(str(file))
