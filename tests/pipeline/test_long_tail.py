"""Accuracy by the frequency of class names, against a loop and in a whole job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.word_counts import WordFrequencies, read_word_frequencies
from pipeline.evaluation.tasks.intervals import means
from pipeline.evaluation.tasks.zero_shot import class_frequencies, long_tail_details, long_tail_outcomes, thirds


def test_a_class_is_as_frequent_as_its_rarest_word() -> None:
    words = WordFrequencies({"dog": 0.5, "red": 0.25, "fox": 0.125, "o'clock": 0.0625}, "ab" * 32)
    names = ["Dog", "red fox", "fox-red dog", "red lynx", "o'clock", "…"]
    assert class_frequencies(names, words).tolist() == [0.5, 0.125, 0.125, 0.0, 0.0625, 0.0]


@given(st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]), min_size=1, max_size=30))
def test_thirds_follow_the_order_and_split_no_ties(frequencies: list[float]) -> None:
    third = thirds(torch.tensor(frequencies, dtype=torch.float64)).tolist()
    for first, one in zip(frequencies, third, strict=True):
        assert one == 3 * sum(other < first for other in frequencies) // len(frequencies)
    if len(set(frequencies)) == len(frequencies) >= 3:
        sizes = [third.count(part) for part in range(3)]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=40))
def test_accuracy_of_each_third_equals_a_loop(samples: list[tuple[bool, int]]) -> None:
    third_C = torch.tensor([0, 0, 1, 1, 2, 2])
    metrics = means(
        long_tail_outcomes(
            torch.tensor([float(hit) for hit, _ in samples]), torch.tensor([label for _, label in samples]), third_C
        )
    )
    expected = {}
    for third, name in enumerate(("rare", "medium", "frequent")):
        of_class = [[hit for hit, label in samples if label == of] for of in (2 * third, 2 * third + 1)]
        shares = [sum(hits) / len(hits) for hits in of_class if hits]
        if shares:
            expected[f"acc1/{name}"] = sum(shares) / len(shares)
    assert metrics == pytest.approx(expected)


def test_details_say_what_rare_means(tmp_path: Path) -> None:
    content = {"format_version": 1, "captions": 5, "words": 10, "counts": {"dog": 5, "cat": 2, "owl": 1}}
    (tmp_path / "words.json").write_text(json.dumps(content))
    words = read_word_frequencies(str(tmp_path / "words.json"))
    frequency_C = class_frequencies(["cat", "dog", "owl"], words)
    details = long_tail_details(frequency_C, thirds(frequency_C), words)
    assert details["word_frequency"] == {
        "rare": {"classes": 1, "from": 0.1, "to": 0.1},
        "medium": {"classes": 1, "from": 0.2, "to": 0.2},
        "frequent": {"classes": 1, "from": 0.5, "to": 0.5},
    }
    assert details["word_counts_sha256"] == words.sha256
