"""What is left of long captions: exact budgets, order, the probabilities that each strategy promises."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import os
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from conftest import ROOT, write_shards
from forked_ranks import start_program
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import UserError
from formats.word_counts import read_word_frequencies
from pipeline import train
from pipeline.data.captions import Tokenizer, load_tokenizer
from pipeline.data.data_loader import MicroBatches, TrainingSet, make_loader
from pipeline.data.sample_order import BatchPlan
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import (
    TextMasker,
    WordMasker,
    choose_words,
    drop_probability,
    random_block,
    random_tokens,
)
from pipeline.data.training_data import read_training_data
from pipeline.recipe import DataSection, TextMaskingSection
from pipeline.recipe_files import load_recipe

COUNTS = {"a": 400, "of": 200, "picture": 50, "number": 50, "cat": 5, "dog": 5}
STRATEGIES = ("none", "truncate", "random", "block", "frequency")
CAPTIONS = [
    "picture number 12 of a cat, a dog and a bird - that's all of it!",
    "A CAT isn't a dog; naïve café (İstanbul) 日本の猫 x_y 3.5 &amp; more",
    "a a a a a a a a a a a a a a a a a a a a",
]


def write_counts(path: Path, **changes: object) -> Path:
    content = {"format_version": 1, "captions": 100, "words": 1000, "counts": COUNTS} | changes
    path.write_text(json.dumps(content))
    return path


def peer_merges() -> Path | None:
    """CLIP's merges in the environment of `make peers`, or in the one that PEERS_PYTHON names."""
    python = Path(os.environ.get("PEERS_PYTHON", ROOT / ".peers" / "bin" / "python"))
    return next(python.parent.parent.glob("lib/python*/site-packages/open_clip/bpe_simple_vocab_16e6.txt.gz"), None)


@pytest.fixture(scope="session", params=["sentencepiece", "byte pairs", "clip"])
def tokenizer(
    request: pytest.FixtureRequest, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    if request.param == "sentencepiece":
        return load_tokenizer(str(tokenizer_file), 77)
    if request.param == "byte pairs":
        merges = tmp_path_factory.mktemp("merges") / "merges.txt.gz"
        merges.write_bytes(gzip.compress(b"#version: 0.2\nc a\nca t</w>\no f</w>\nn u\nnu m\n"))
        return load_tokenizer(str(merges), 77)
    if (path := peer_merges()) is None:
        pytest.skip("no merges of CLIP: run `make peers`, or set PEERS_PYTHON")
    return load_tokenizer(str(path), 77)


@pytest.fixture
def masker(tmp_path: Path) -> Callable[..., TextMasker]:
    def make(tokenizer: Tokenizer, strategy: str, max_tokens: int | None, threshold: float = 0.02) -> TextMasker:
        options = {"strategy": strategy, "max_tokens": max_tokens, "frequency_threshold": threshold}
        options["word_counts"] = str(write_counts(tmp_path / "words.json"))
        return TextMasker(tokenizer, TextMaskingSection.model_validate(options))

    return make


class LetterEncoder:
    """A token per letter, so that a word is as long as it looks."""

    vocab_size, start_token_id, end_token_id = 1 << 20, 0, 1

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text if letter != " "]


def is_subsequence(part: Sequence[int], whole: Sequence[int]) -> bool:
    rest = iter(whole)
    return all(token in rest for token in part)


def assert_frequencies(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> None:
    """Each outcome as often as expected, within five standard deviations; nothing else."""
    total = seen.total()
    assert seen.keys() <= {outcome for outcome, probability in expected.items() if probability > 0}
    for outcome, probability in expected.items():
        deviation = (probability * (1 - probability) / total) ** 0.5
        assert abs(seen[outcome] / total - probability) <= 5 * deviation, outcome


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_captions_within_the_budget_are_not_touched(
    strategy: str, tokenizer: Tokenizer, masker: Callable[..., TextMasker]
) -> None:
    for caption in CAPTIONS:
        whole = tokenizer.encode(caption)
        at_the_limit = Tokenizer(tokenizer.encoder, tokenizer.source, len(whole))
        for limited, max_tokens in ((tokenizer, len(whole)), (at_the_limit, None)):
            assert masker(limited, strategy, max_tokens).encode(caption, Random(0)) == whole


@pytest.mark.parametrize("strategy", ["truncate", "random", "block"])
def test_token_strategies_fill_the_budget_exactly(
    strategy: str, tokenizer: Tokenizer, masker: Callable[..., TextMasker]
) -> None:
    long = CAPTIONS[0] * 10  # over the context length as well
    whole = tokenizer.encoder.encode(long)
    results = set()
    for max_tokens, seed in itertools.product((3, 4, 9, 77), range(8)):
        start, *kept, end = masker(tokenizer, strategy, max_tokens).encode(long, Random(seed))
        assert (start, end) == (tokenizer.encoder.start_token_id, tokenizer.encoder.end_token_id)
        assert len(kept) == max_tokens - 2
        assert is_subsequence(kept, whole)
        if strategy == "truncate":
            assert kept == whole[: len(kept)]
        if strategy == "block":
            assert any(kept == whole[first : first + len(kept)] for first in range(len(whole)))
        results.add(tuple(kept))
    assert (len(results) == 4) == (strategy == "truncate")


def test_none_is_plain_encoding(tokenizer: Tokenizer, masker: Callable[..., TextMasker]) -> None:
    long = CAPTIONS[0] * 10
    assert masker(tokenizer, "none", 5).encode(long, Random(0)) == tokenizer.encode(long)
    assert len(tokenizer.encode(long)) == 77


def test_every_choice_of_random_tokens_is_equally_likely() -> None:
    rng = Random(1)
    seen = Counter(tuple(random_tokens(range(5), 2, rng)) for _ in range(10_000))
    assert_frequencies(seen, dict.fromkeys(itertools.combinations(range(5), 2), 1 / 10))


def test_every_start_of_a_block_is_equally_likely() -> None:
    rng = Random(1)
    seen = Counter(tuple(random_block(range(6), 3, rng)) for _ in range(10_000))
    assert_frequencies(seen, dict.fromkeys([(n, n + 1, n + 2) for n in range(4)], 1 / 4))


def test_drop_probability_has_the_formulas_limits() -> None:
    assert drop_probability(1e-6, 1e-6) == 0
    assert drop_probability(1e-9, 1e-6) == 0
    assert drop_probability(4e-6, 1e-6) == pytest.approx(0.5)
    assert drop_probability(1e-2, 1e-6) == pytest.approx(0.99)
    assert drop_probability(0.07, 1.0) == 0


@given(
    st.lists(st.tuples(st.integers(1, 4), st.floats(0, 1)), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(0, 1000),
)
def test_words_are_the_best_that_the_budget_holds(words: list[tuple[int, float]], budget: int, seed: int) -> None:
    lengths, probabilities = zip(*words, strict=True)
    kept = choose_words(lengths, probabilities, budget, Random(seed))
    # independently: of all sets within the budget, the one whose best word is best, then whose second best is, …
    rng = Random(seed)
    scores = [rng.random() - probability for probability in probabilities]
    ranked = sorted(range(len(words)), key=lambda index: -scores[index])
    sets = [chosen for size in range(len(words) + 1) for chosen in itertools.combinations(range(len(words)), size)]
    affordable = [chosen for chosen in sets if sum(lengths[index] for index in chosen) <= budget]
    assert tuple(kept) == max(affordable, key=lambda chosen: [index in chosen for index in ranked])


@pytest.mark.parametrize("probabilities", [(0.75, 0.0, 0.25), (0.5, 0.5, 0.5), (0.0, 0.0, 1.0)])
def test_frequent_words_go_as_often_as_an_enumeration_says(probabilities: tuple[float, ...]) -> None:
    # u on a grid; who is last goes, ties in equal parts (of six, to stay with whole numbers)
    steps = [(step + 0.5) / 40 for step in range(40)]
    sixths: Counter[tuple[int, ...]] = Counter()
    for draws in itertools.product(steps, repeat=3):
        scores = [round(u - p, 6) for u, p in zip(draws, probabilities, strict=True)]
        lowest = [index for index in range(3) if scores[index] == min(scores)]
        for index in lowest:
            sixths[tuple(n for n in range(3) if n != index)] += 6 // len(lowest)
    expected = {kept: count / 6 / len(steps) ** 3 for kept, count in sixths.items()}
    rng = Random(2)
    assert_frequencies(Counter(tuple(choose_words((1, 1, 1), probabilities, 2, rng)) for _ in range(20_000)), expected)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        # p_drop = 0.75 and 0: "aa" stays if its u exceeds the other's by 0.75, in (1 - 0.75)**2 / 2 of all cases
        (0.01, 1 / 32),
        (0.16, 1 / 2),  # at most the threshold: all alike
        (1.0, 1 / 2),
        (1e-18, 1 / 2),  # far above the threshold: all alike again
    ],
)
def test_threshold_decides_how_much_rarer_words_are_preferred(threshold: float, expected: float) -> None:
    words = WordMasker(LetterEncoder(), {"aa": 0.16, "bb": 0.01}, threshold)
    rng = Random(3)
    seen = Counter(tuple(words.cut("Aa... bb", 3, rng)) for _ in range(20_000))
    assert_frequencies(seen, {(ord("A"), ord("a")): expected, (ord("b"), ord("b")): 1 - expected})


def test_words_without_a_count_are_as_good_as_the_rarest() -> None:
    words = WordMasker(LetterEncoder(), {"aa": 0.16, "bb": 0.04}, 0.01)  # p_drop 0.75 and 0.5
    rng = Random(4)
    seen = Counter("".join(map(chr, words.cut("xx bb", 2, rng))) for _ in range(5000))
    assert abs(seen["xx"] / 5000 - 1 / 2) < 5 * (1 / 4 / 5000) ** 0.5
    seen = Counter("".join(map(chr, words.cut("xx aa", 2, rng))) for _ in range(5000))
    assert abs(seen["aa"] / 5000 - 0.75**2 / 2) < 5 * (1 / 4 / 5000) ** 0.5


def test_word_strategy_keeps_whole_words_and_wastes_nothing(
    tokenizer: Tokenizer, masker: Callable[..., TextMasker]
) -> None:
    encode = tokenizer.encoder.encode
    caption = CAPTIONS[0]
    words = ["picture", "number", "12", "of", "a", "cat", "a", "dog", "and", "a", "bird", "that's", "all", "of", "it"]
    lengths = [len(encode(word)) for word in words]
    # every choice of words that leaves no room for another, as a caption of its own
    choices = set()
    for chosen in itertools.product((False, True), repeat=len(words)):
        spent = sum(itertools.compress(lengths, chosen))
        left = [length for length, kept in zip(lengths, chosen, strict=True) if not kept]
        if spent <= 10 and (not left or min(left) > 10 - spent):
            ids = encode(" ".join(itertools.compress(words, chosen)))
            choices.add(tuple(ids))
            assert len(ids) == spent
    masked = masker(tokenizer, "frequency", 12)
    results = {tuple(masked.encode(caption, Random(seed))) for seed in range(50)}
    for start, *kept, end in results:
        assert (start, end) == (tokenizer.encoder.start_token_id, tokenizer.encoder.end_token_id)
        assert tuple(kept) in choices
    assert len(results) > 10


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6), max_size=5))
def test_lengths_of_words_add_up(tokenizer: Tokenizer, words: list[str]) -> None:
    encode = tokenizer.encoder.encode
    assert encode(" ".join(words)) == [token for word in words for token in encode(word)]


@pytest.mark.parametrize("caption", ["日本の猫" * 20, "😀" * 50, "... !!! " * 30])
def test_what_has_no_word_that_fits_is_truncated(
    caption: str, tokenizer: Tokenizer, masker: Callable[..., TextMasker]
) -> None:
    assert masker(tokenizer, "frequency", 7).encode(caption, Random(0)) == masker(tokenizer, "truncate", 7).encode(
        caption, Random(1)
    )


def training_set(shards: Path, text_masker: TextMasker, seed: int = 0, crop_min_area: float = 0.5) -> TrainingSet:
    section = DataSection(train=str(shards), window_shards=2)
    data = read_training_data(section)
    return TrainingSet(
        ShardReader(data.shards, make_cache(section)), data.order(section, seed), seed, text_masker, 16, crop_min_area
    )


@pytest.mark.parametrize("strategy", ["random", "block", "frequency"])
def test_what_stays_follows_from_seed_and_position(
    strategy: str, shards: Path, tokenizer_file: Path, masker: Callable[..., TextMasker]
) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file), 64)
    plain = training_set(shards, masker(tokenizer, "none", None))
    data = training_set(shards, masker(tokenizer, strategy, 6))
    batches = MicroBatches(BatchPlan(96, 16, 8, 2), 1, 0, 12)
    alone, by_two, whole = (
        list(make_loader(*of, False)) for of in ((data, batches, 0), (data, batches, 2), (plain, batches, 0))
    )
    assert sum(batch.tokens_N.numel() for batch in alone) < sum(batch.tokens_N.numel() for batch in whole)
    for a, b, c in zip(alone, by_two, whole, strict=True):
        assert torch.equal(a.tokens_N, b.tokens_N)
        assert torch.equal(a.cu_seqlens_B1, b.cu_seqlens_B1)
        assert torch.equal(a.images_BCHW, c.images_BCHW)
    # from anywhere, in any order, by a worker that is not forked, whatever the crops
    fresh = pickle.loads(pickle.dumps(training_set(shards, masker(tokenizer, strategy, 6), crop_min_area=0.1)))
    positions = range(191, -1, -5)
    assert [fresh[position].token_ids for position in positions] == [data[position].token_ids for position in positions]


@pytest.mark.parametrize("strategy", ["random", "block", "frequency"])
def test_the_same_caption_is_cut_otherwise_at_another_place(
    strategy: str, tmp_path: Path, tokenizer_file: Path, masker: Callable[..., TextMasker]
) -> None:
    text_masker = masker(load_tokenizer(str(tokenizer_file), 64), strategy, 6)
    caption = b"picture number 12 of a dog"
    shards = write_shards(tmp_path / "shards", [20], {f"{number:08d}.txt": caption for number in range(20)})
    for positions in (range(0, 400, 20), range(20)):  # the first of each epoch, all of one
        data = training_set(shards, text_masker)
        assert len({tuple(data[position].token_ids) for position in positions}) > 1
    by_seed = {tuple(training_set(shards, text_masker, seed)[0].token_ids) for seed in range(20)}
    assert len(by_seed) > 1


def test_word_counts_are_read_as_shares_of_all_words(tmp_path: Path) -> None:
    path = write_counts(tmp_path / "words.json", note="fields that nobody knows are ignored")
    known = read_word_frequencies(str(path))
    assert known.frequencies == {word: count / 1000 for word, count in COUNTS.items()}
    (tmp_path / "same").write_bytes(path.read_bytes())
    assert read_word_frequencies(f"file://{tmp_path}/same").sha256 == known.sha256
    assert read_word_frequencies(str(write_counts(path, captions=101))).sha256 != known.sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version: Input should be 1"),
        ({"counts": None}, "counts: Input should be an object"),
        ({"counts": {"a": "many"}}, "counts.a: Input should be a valid integer"),
        ({"counts": {"a": 0}}, "counts.a: Input should be greater than 0"),
        ({"counts": {"a\nb": -1}}, "counts.a b: Input should be greater than 0"),
        ({"words": 0}, "words: Input should be greater than 0"),
        ({"words": 709}, "its counts exceed its 709 words"),
    ],
)
def test_wrong_word_counts_are_one_clear_line(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    path = write_counts(tmp_path / "words.json", **changes)
    with pytest.raises(UserError) as caught:
        read_word_frequencies(str(path))
    assert f"{path} is not a word-count file ({message}): make it with `data-prep words" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_word_count_file_is_one_clear_line(tmp_path: Path) -> None:
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"format_version": 1}'):
        (tmp_path / "words.json").write_bytes(content)
        with pytest.raises(UserError, match=r"is not a word-count file \(.+\): make it") as caught:
            read_word_frequencies(str(tmp_path / "words.json"))
        assert "\n" not in str(caught.value)
    for path in (str(tmp_path / "absent.json"), "nowhere://words.json"):
        with pytest.raises(UserError, match=r"cannot read word counts at .*: make it with `data-prep words"):
            read_word_frequencies(path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["max_tokens=33"], "demo: text_masking.max_tokens 33 exceeds the context length 32: lower it"),
        (["max_tokens=2"], "text_masking.max_tokens: Input should be greater than 2"),
        (["strategy=frequency"], "text_masking: strategy frequency needs word_counts=FILE"),
        (["strategy=syntax"], "text_masking.strategy: Input should be 'none', 'truncate', 'random', 'block' or"),
        (["strategy=frequency", "word_counts=w", "frequency_threshold=0"], "greater than 0"),
    ],
)
def test_wrong_recipes_are_one_clear_line(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [f"text_masking.{override}" for override in overrides])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_run_remembers_its_word_counts(tmp_path: Path, tiny_options: list[str]) -> None:
    counts = write_counts(tmp_path / "words.json")
    options = [*tiny_options, "train.max_steps=2", f"train.output={tmp_path / 'run'}"]
    options += ["text_masking.strategy=frequency", "text_masking.max_tokens=5", f"text_masking.word_counts={counts}"]
    program = start_program(train.main, options, 1, tmp_path / "program")
    assert program.wait() == [0], program.output()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["word_counts_sha256"] == hashlib.sha256(counts.read_bytes()).hexdigest()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["text_tokens"] <= 8 * 5 for line in lines)

    write_counts(counts, words=2000)
    again = start_program(train.main, options, 1, tmp_path / "program")
    assert again.wait() == [2]
    assert "was started with other word counts (word_counts_sha256 " in again.output()
