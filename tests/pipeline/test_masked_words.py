"""Masked words of captions: whole ones, of the stages so far, as many as the budget says, replaced as BERT does."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.concepts import Concept, Concepts, write_concepts
from formats.errors import UserError
from pipeline.data.captions import Tokenizer, load_tokenizer, tokenizer_from_bytes
from pipeline.data.curriculum import Curriculum, read_curriculum
from pipeline.data.data_loader import CaptionSet, collate
from pipeline.data.masked_words import CaptionMasker, Span, choose_spans, tokens_of_words
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.training_data import read_training_data
from pipeline.recipe import ConceptsSection, CurriculumKind, DataSection
from pipeline.recipe_files import parse_recipe

STAGES = {"dog": 1, "cat": 1, "number": 2, "picture number": 3, "of a": 3, "bird": 3}
COUNTS = {"dog": 50, "cat": 40, "number": 10, "picture number": 9, "of a": 60, "bird": 1}
CONCEPTS = Concepts([Concept(words, stage, COUNTS[words], 1) for words, stage in STAGES.items()], 100, "")
WORDS = ["a", "picture", "number", "dog", "cat", "bird", "of", "café", "ﬁsh", "日本"]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return load_tokenizer(str(tokenizer_file), 64)


@pytest.fixture(scope="module")
def byte_pairs() -> Tokenizer:
    return tokenizer_from_bytes(gzip.compress(b"#version: 0.2\nc a\nca t</w>\nd o\ndo g</w>\n"), 64, "merges")


def masker(tokenizer: Tokenizer, kind: CurriculumKind, *boundaries: int, longest: int = 64) -> CaptionMasker:
    return CaptionMasker(tokenizer, Curriculum(CONCEPTS, boundaries), kind, longest)


captions = st.lists(st.sampled_from(WORDS), min_size=1, max_size=20)
separators = st.sampled_from([" ", "  ", ", ", " - "])


@given(words=captions, separator=separators, has_bytes=st.booleans())
def test_the_tokens_of_a_word_spell_it(
    words: list[str], separator: str, has_bytes: bool, tokenizer: Tokenizer, byte_pairs: Tokenizer
) -> None:
    """Found by re-encoding: what is before a word has the tokens before its own."""
    encoder = (byte_pairs if has_bytes else tokenizer).encoder
    text = separator.join(words).replace("ﬁ", "fi")  # what SentencePiece makes of it anyway
    encoded = encoder.encode_with_spans(text)
    assert encoded.ids == encoder.encode(text)
    found, spans = tokens_of_words(encoded)
    assert found == re.findall(r"\w+", text)
    place = 0
    for word, span in zip(found, spans, strict=True):
        place = text.index(word, place) + len(word)
        assert encoder.encode(text[:place]) == encoded.ids[: span.last]
        assert place - len(word) == 0 or span.first >= len(encoder.encode(text[: place - len(word)].rstrip()))
        text_of_span = "".join(encoded.text[b:e] for b, e in dict.fromkeys(encoded.spans[slice(*span)]))
        assert text_of_span.strip() == word


def candidates_by_hand(words: list[str], kind: str, stage: int) -> set[tuple[int, int]]:
    """(first, last) in words of what a stage may mask."""
    every = {(i, i + 1) for i in range(len(words))}
    if kind == "concepts":
        pairs = every | {(i, i + 2) for i in range(len(words) - 1)}
        return {(i, j) for i, j in pairs if STAGES.get(" ".join(words[i:j]), 9) <= stage}
    if kind == "rarity":  # the four single words by count, in three parts: dog, cat; number; bird; then all others
        stage_of = {"dog": 1, "cat": 1, "number": 2, "bird": 3}
        return {(i, j) for i, j in every if stage_of.get(words[i], 3) <= stage}
    return every


KINDS: tuple[CurriculumKind, ...] = ("concepts", "none", "length", "rarity", "masking_ratio")


@given(words=captions, kind=st.sampled_from(KINDS), stage=st.integers(1, 3), seed=st.integers(0, 999))
def test_whole_words_of_the_stages_so_far_are_masked(
    words: list[str], kind: CurriculumKind, stage: int, seed: int, tokenizer: Tokenizer
) -> None:
    words = [word.replace("ﬁ", "fi") for word in words]
    longest, caption = 24, " ".join(words)
    whole = tokenizer.encoder.encode(caption)
    ends = [len(tokenizer.encoder.encode(" ".join(words[:n]))) for n in range(len(words) + 1)]
    room = {1: 8, 2: 16, 3: 24}[stage] - 2 if kind == "length" else longest - 2
    share = {1: 0.075, 2: 0.15, 3: 0.225}[stage] if kind == "masking_ratio" else 0.15

    seen = [0, 100, 250][stage - 1]
    found = masker(tokenizer, kind, 100, 250, longest=longest).mask(caption, Random(seed), seen)
    assert found == masker(tokenizer, kind, 100, 250, longest=longest).mask(caption, Random(seed), seen)
    ids = tokenizer.with_ends(whole[:room])
    assert len(found.token_ids) == len(ids)
    places = [place for place, _ in found.masked]
    assert places == sorted(set(places))
    assert all(ids[place] == token for place, token in found.masked), "the true tokens are the labels"
    assert all(a == b for i, (a, b) in enumerate(zip(ids, found.token_ids, strict=True)) if i not in places)

    def tokens(unit: tuple[int, int]) -> set[int]:
        """Places of a unit; a blank that is a token of its own is none of them."""
        first, last = (ends[number] for number in unit)
        return {1 + n for n in range(first, last) if whole[n] != blank(tokenizer)}

    allowed = [tokens(unit) for unit in candidates_by_hand(words, kind, stage) if ends[unit[1]] <= room]
    covered = set().union(*(unit for unit in allowed if unit <= set(places)))
    assert covered == set(places), "whole units alone, and of those that are allowed"
    budget = max(1, round(share * min(room, len(whole))))
    assert bool(places) == bool(allowed)
    assert len(places) <= max([budget, *map(len, allowed)])
    left = budget - len(places)
    free = [unit for unit in allowed if unit.isdisjoint(places)]
    assert all(len(unit) > left for unit in free), "nothing more would have fitted"


def blank(tokenizer: Tokenizer) -> int:
    """SentencePiece's token for a blank before a word whose first letter is no piece with a blank."""
    return tokenizer.encoder.encode("日")[0]


@given(
    spans=st.lists(
        st.tuples(st.integers(0, 20), st.integers(1, 4)).map(lambda s: Span(s[0], s[0] + s[1])), unique=True
    ),
    budget=st.integers(1, 8),
    seed=st.integers(0, 99),
)
def test_spans_never_cross_and_each_comes_first_as_often(spans: list[Span], budget: int, seed: int) -> None:
    chosen = choose_spans(spans, budget, Random(seed))
    places = [place for span in chosen for place in range(*span)]
    assert set(chosen) <= set(spans)
    assert len(places) == len(set(places))
    assert len(places) <= budget or len(chosen) == 1


def test_eighty_ten_ten_of_whole_concepts(tokenizer: Tokenizer) -> None:
    """And 15 % of tokens, where everything may be masked."""
    alone = CaptionMasker(
        tokenizer, Curriculum(Concepts([Concept("picture number", 1, 9, 1)], 9, ""), ()), "concepts", 64
    )
    caption = "a picture number of a dog and a cat and a bird"
    concept, mask_id = tokenizer.encoder.encode("picture number"), tokenizer.encoder.vocab_size
    length = len(concept) - (concept[0] == blank(tokenizer))
    fates: Counter[str] = Counter()
    for seed in range(2000):
        found = alone.mask(caption, Random(seed), 0)
        shown = [found.token_ids[place] for place, _ in found.masked]
        assert len(shown) == length
        assert not {tokenizer.encoder.start_token_id, tokenizer.encoder.end_token_id} & set(shown)
        is_masked = [token == mask_id for token in shown]
        assert all(is_masked) or not any(is_masked), "one fate for a whole concept"
        is_same = all(token == label for token, (_, label) in zip(shown, found.masked, strict=True))
        fates["masked" if all(is_masked) else "same" if is_same else "random"] += 1
    # three deviations of 2,000 draws
    assert [fates[fate] / 2000 for fate in ("masked", "random", "same")] == pytest.approx([0.8, 0.1, 0.1], abs=0.027)

    everything = masker(tokenizer, "masking_ratio")  # without stages: as plain as "none"
    long = " ".join([caption] * 3)
    tokens = len(everything.mask(long, Random(0), 0).token_ids) - 2
    shares = [len(everything.mask(long, Random(seed), 0).masked) / tokens for seed in range(300)]
    assert sum(shares) / len(shares) == pytest.approx(0.15, abs=0.02)


def test_nothing_is_masked_where_the_stage_knows_nothing(tokenizer: Tokenizer) -> None:
    found = masker(tokenizer, "concepts", 100, 250).mask("a bird of a picture", Random(0), 0)
    assert found.token_ids == tokenizer.encode("a bird of a picture")
    assert found.masked == []


def test_the_loader_packs_what_is_masked(shards: Path, tokenizer: Tokenizer) -> None:
    section = DataSection(train=str(shards))
    data = read_training_data(section)
    dataset = CaptionSet(
        ShardReader(data.shards, make_cache(section)), data.order(section, 0), 0, masker(tokenizer, "concepts"), 0
    )
    samples = [dataset[position] for position in range(6)]
    samples.append(samples[0]._replace(masked=[]))
    batch = collate(samples)
    assert batch.images_BCHW.shape == (7, 3, 0, 0)
    assert batch.words is not None
    expected = []
    for sample, first in zip(samples, batch.cu_seqlens_B1.tolist(), strict=False):
        expected += [(first + place, token) for place, token in sample.masked or []]
    assert list(zip(batch.words.token_R.tolist(), batch.words.labels.class_M.tolist(), strict=True)) == expected
    assert batch.words.labels.lengths_B.tolist() == [1] * len(expected)
    assert batch.words.num_masked == len(expected) > 0

    tokens = int(batch.cu_seqlens_B1[3])
    first, alone = batch.words.among_first(tokens), collate(samples[:3]).words
    assert alone is not None
    assert [value.tolist() for value in (first.token_R, *first.labels)] == [
        value.tolist() for value in (alone.token_R, *alone.labels)
    ]

    nothing = collate([samples[-1]]).words
    assert nothing is not None
    for words in (nothing, nothing.among_first(1), batch.words.among_first(1)):
        assert (words.token_R.tolist(), words.num_masked, words.labels.lengths_B.tolist()) == ([0], 0, [0])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"concepts": {"objective": "mlm"}, "text_masking": {"strategy": "random", "max_tokens": 8}}, "whole words"),
        ({"concepts": {"objective": "mlm", "curriculum": "wonder"}}, "curriculum"),
    ],
)
def test_what_makes_no_sense_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_recipe(fields, "test")


def test_only_curricula_of_concepts_need_a_file(tmp_path: Path) -> None:
    for kind in KINDS:
        section = ConceptsSection(objective="mlm", curriculum=kind, boundaries=(5, 9))
        if kind in ("concepts", "rarity"):
            with pytest.raises(UserError, match=r"needs concepts\.file"):
                read_curriculum(section)
            continue
        read = read_curriculum(section)
        assert read is not None
        assert [read.stage(seen) for seen in (0, 5, 9)] == [1, 2, 3]
    write_concepts(tmp_path / "c.jsonl", CONCEPTS.concepts, 100, {})
    read = read_curriculum(ConceptsSection(objective="mlm", file=str(tmp_path / "c.jsonl")))
    assert read is not None
    assert read.num_stages == read.stage(0) == 3
