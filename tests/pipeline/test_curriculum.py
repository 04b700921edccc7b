"""Stages of concepts by samples seen; which words of a caption stay; what the loader says that captions name."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.concepts import Concept, write_concepts
from formats.errors import UserError
from pipeline.data.captions import load_tokenizer
from pipeline.data.curriculum import Curriculum, planned_curriculum, read_curriculum
from pipeline.data.data_loader import TrainingSet, collate
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import read_training_data
from pipeline.recipe import ConceptsSection, DataSection, TextMaskingSection
from pipeline.recipe_files import parse_recipe

STAGES = {"dog": 1, "cat": 1, "number": 2, "picture number": 3, "picture": 3, "bird": 3}
UNCONNECTED = "number"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("concepts") / "concepts.jsonl"
    concepts = [Concept(words, stage, 9, int(words != UNCONNECTED)) for words, stage in STAGES.items()]
    write_concepts(path, concepts, 100, {})
    return str(path)


def curriculum(file: str, *boundaries: int) -> Curriculum:
    read = read_curriculum(ConceptsSection(file=file, objective="keep", boundaries=boundaries))
    assert read is not None
    return read


def test_the_stage_follows_from_the_samples_seen(file: str) -> None:
    taught = curriculum(file, 100, 250)
    assert [taught.stage(seen) for seen in (0, 99, 100, 249, 250, 10**9)] == [1, 1, 2, 2, 3, 3]
    assert [taught.num_taught(seen) for seen in (0, 100, 250)] == [2, 3, 6]
    assert curriculum(file).stage(0) == 3
    assert read_curriculum(ConceptsSection(file="nowhere")) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"objective": "predict", "file": "x", "boundaries": [5, 5]}, "ascending and above 0"),
        ({"objective": "predict", "file": "x", "boundaries": [0]}, "ascending and above 0"),
        ({"objective": "keep", "file": "x"}, "give text_masking.max_tokens, and text_masking.strategy none"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_recipe({"concepts": fields}, "test")


def test_boundaries_are_those_of_the_stages(file: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"boundaries has 1 numbers, and .* has 3 stages: give 2"):
        curriculum(file, 100)
    with pytest.raises(UserError, match=r"predict needs concepts\.file, made by `data-prep concepts`"):
        read_curriculum(ConceptsSection(objective="predict"))
    with pytest.raises(UserError, match="cannot read concepts"):
        curriculum(str(tmp_path / "none"))


def test_a_plan_may_be_older_than_its_concepts(tmp_path: Path) -> None:
    planned = planned_curriculum(ConceptsSection(file=str(tmp_path / "none"), objective="predict", boundaries=(7, 9)))
    assert planned is not None
    assert planned.num_taught(0) == 10_000


def obvious(words: list[str], budget: int, stage: int, order: list[int], length_of: dict[str, int]) -> list[str]:
    """Units cut by hand, sorted, taken one after the other; `order` is how chance has them."""
    units: list[list[str]] = []
    rest = list(words)
    while rest:
        length = 2 if " ".join(rest[:2]) in STAGES else 1
        units.append(rest[:length])
        rest = rest[length:]

    def distance(unit: list[str]) -> int:
        name = " ".join(unit)
        return 3 if name not in STAGES or name == UNCONNECTED else abs(STAGES[name] - stage)

    kept = set()
    for index in sorted(range(len(units)), key=lambda i: (distance(units[i]), order.index(i))):
        tokens = sum(length_of[word] for word in units[index])
        if tokens <= budget:
            budget -= tokens
            kept.add(index)
    return [word for index in sorted(kept) for word in units[index]]


@given(
    words=st.lists(st.sampled_from(["a", "picture", "number", "dog", "cat", "bird", "of"]), min_size=1, max_size=9),
    budget=st.integers(1, 9),
    seen=st.sampled_from([0, 100, 250]),
    seed=st.integers(0, 99),
)
def test_what_is_near_the_stage_stays(
    file: str, tokenizer_file: Path, words: list[str], budget: int, seen: int, seed: int
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file), 64)
    masker = TextMasker(tokenizer, TextMaskingSection(max_tokens=budget + 2), curriculum(file, 100, 250))
    caption = " ".join(words)
    found = masker.encode(caption, Random(seed), seen)
    if len(tokenizer.encode(caption)) <= budget + 2:
        assert found == tokenizer.encode(caption)
        return
    length_of = {word: len(tokenizer.encoder.encode(word)) for word in words}
    rng, units = Random(seed), caption.replace("picture number", "picture_number").split()
    chances = [rng.random() for _ in units]
    order = sorted(range(len(units)), key=chances.__getitem__, reverse=True)
    kept = obvious(words, budget, curriculum(file, 100, 250).stage(seen), order, length_of)
    expected = (
        tokenizer.encode(" ".join(kept)) if kept else tokenizer.with_ends(tokenizer.encoder.encode(caption)[:budget])
    )
    assert found == expected


def test_the_loader_says_what_whole_captions_name(file: str, shards: Path, tokenizer_file: Path) -> None:
    section = DataSection(train=str(shards))
    data = read_training_data(section)
    taught = curriculum(file, 100, 250)
    masker = TextMasker(load_tokenizer(str(tokenizer_file), 64), TextMaskingSection(strategy="truncate", max_tokens=4))
    reader = ShardReader(data.shards, make_cache(section))
    dataset = TrainingSet(reader, data.order(section, 0), 0, masker, 16, 0.9, taught.concepts)
    samples = [dataset[position] for position in range(5)]
    assert all(len(sample.token_ids) == 4 for sample in samples)
    labels = collate(samples).concepts
    assert labels is not None
    names = [taught.concepts.concepts[number].concept for number in labels.class_M.tolist()]
    ends = labels.cu_labels_B1.tolist()
    for row, sample in enumerate(samples):
        number = int(sample.key.rpartition(" ")[2])
        animal = ["cat", "dog", "bird"][number % 3]
        assert sorted(names[ends[row] : ends[row + 1]]) == sorted({"number", "picture number", "picture", animal})
