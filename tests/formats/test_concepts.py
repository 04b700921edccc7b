"""The file of concepts: what is written is read, what is no such file is named with its line, occurrences by hand."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.concepts import Concept, read_concepts, write_concepts
from formats.errors import UserError

CONCEPTS = [Concept("dog", 1, 5, 3), Concept("dog house", 2, 2, 1), Concept("house", 2, 3, 2), Concept("red", 3, 1, 0)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_concepts(tmp_path / "concepts.jsonl", CONCEPTS, 6, {"source": "shards"})
    return tmp_path / "concepts.jsonl"


def test_what_is_written_is_read(file: Path) -> None:
    read = read_concepts(str(file))
    assert (list(read.concepts), read.captions, read.num_stages) == (CONCEPTS, 6, 3)
    assert [read.up_to(stage) for stage in range(5)] == [0, 1, 3, 4, 4]


def test_concepts_within_others_are_found_too(file: Path) -> None:
    read = read_concepts(str(file))
    found = list(read.occurrences(["a", "red", "dog", "house"]))
    assert found == [(1, 2, 3), (2, 3, 0), (2, 4, 1), (3, 4, 2)]
    assert read.named_in("A Dog's dog—house, DOG!") == [0, 1, 2]
    assert read.named_in("") == []


@given(st.lists(st.sampled_from(["dog", "house", "red", "a"]), max_size=7))
def test_occurrences_are_all_runs_that_are_concepts(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    folder = tmp_path_factory.mktemp("concepts")
    write_concepts(folder / "c.jsonl", CONCEPTS, 6, {})
    read = read_concepts(str(folder / "c.jsonl"))
    names = [concept.concept for concept in CONCEPTS]
    runs = [(a, b) for a in range(len(words)) for b in range(a + 1, len(words) + 1)]
    slow = [(a, b, names.index(" ".join(words[a:b]))) for a, b in runs if " ".join(words[a:b]) in names]
    assert [tuple(found) for found in read.occurrences(words)] == slow


@pytest.mark.parametrize(
    ("line", "content", "reason"),
    [
        (1, "", "Invalid JSON"),
        (1, '{"format": "words", "version": 1, "captions": 6, "stages": 3}', "format: Input should be 'concepts'"),
        (3, '{"concept": "Dog", "stage": 2, "count": 1, "degree": 0}', "'Dog' is not one to 4 lower-case words"),
        (3, '{"concept": "a b c d e", "stage": 2, "count": 1, "degree": 0}', "is not one to 4"),
        (3, '{"concept": "dog", "stage": 2, "count": 1, "degree": 0}', "'dog' comes a second time"),
        (4, '{"concept": "house", "stage": 1, "count": 1, "degree": 0}', "stage 1 is out of order"),
        (5, '{"concept": "red", "stage": 4, "count": 1, "degree": 0}', "stage 4 is out of order"),
        (5, '{"concept": "red", "stage": 2, "count": 1, "degree": 0}', "no concept of the last of 3 stages"),
        (5, '{"concept": "red", "stage": 3, "count": 7, "degree": 0}', "'red' is in more captions than there are"),
        (5, '{"concept": "red", "stage": 3, "count": true, "degree": 0}', "count: "),
    ],
)
def test_what_is_no_such_file_is_named(file: Path, line: int, content: str, reason: str) -> None:
    lines = file.read_text().splitlines()
    lines[line - 1] = content
    file.write_text("\n".join(lines))
    with pytest.raises(UserError, match=rf"concepts\.jsonl, line {line}: .*{reason}.*data-prep concepts"):
        read_concepts(str(file))


def test_a_missing_file_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read concepts at .*data-prep concepts"):
        read_concepts(str(tmp_path / "none"))
