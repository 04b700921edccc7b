from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
from make_images import encoded, write_tar

from data_prep.tokens.clip_merges import MERGES, ClipBytePairs
from data_prep.tokens.fertility import fertility
from data_prep.tokens.training import TokenizerSettings, train_tokenizer
from formats.errors import UserError

WORDS = ("red", "blue", "green", "small", "large", "circle", "square", "star", "left", "above")
CAPTIONS = [f"A {a} {b} Ähre {c}." for a, b, c in itertools.permutations(WORDS, 3)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shards")
    image = encoded(size=4)
    for shard in range(2):
        members = []
        for index, caption in enumerate(CAPTIONS[shard::2]):
            members += [(f"{index}.jpg", image), (f"{index}.txt", caption.encode())]
        members += [("x.jpg", image), ("y.txt", b"\xff\xfe"), ("z.txt", b"")]
        write_tar(directory / f"{shard:05d}.tar", members)
    return directory


def train(shards: Path, output: Path, vocab_size: int = 400, max_captions: int = 10_000, seed: int = 0) -> bytes:
    train_tokenizer(shards, output, TokenizerSettings("unigram", vocab_size, max_captions, seed))
    return output.read_bytes()


def test_ids_case_and_byte_fallback(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "tokenizer.model"
    train(shards, output)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert (processor.pad_id(), processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2, 3)
    assert processor.encode("A RED Circle") == processor.encode("a red circle")
    assert len(processor.encode("a red circle")) <= 4
    unseen = "日本 \N{CAT FACE}"
    assert processor.unk_id() not in processor.encode(unseen)
    assert processor.decode(processor.encode(unseen)) == unseen


def test_few_captions_give_fewer_pieces_than_asked_for(shards: Path, tmp_path: Path) -> None:
    for model_type in ("unigram", "bpe"):
        size = train_tokenizer(shards, tmp_path / "tokenizer.model", TokenizerSettings(model_type))
        assert 260 < size < 8192


def test_byte_pairs_keep_frequent_words_whole(shards: Path, tmp_path: Path) -> None:
    train_tokenizer(shards, tmp_path / "tokenizer.model", TokenizerSettings("bpe", 600))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.encode("a red circle", out_type=str) == ["▁a", "▁red", "▁circle"]


def test_equal_input_gives_an_equal_model(shards: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "a") == train(shards, tmp_path / "b")


def test_a_sample_of_the_captions_depends_on_the_seed(shards: Path, tmp_path: Path) -> None:
    first = train(shards, tmp_path / "a", max_captions=50, seed=0)
    assert train(shards, tmp_path / "b", max_captions=50, seed=0) == first
    assert train(shards, tmp_path / "c", max_captions=50, seed=1) != first


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_no_caption_is_too_long_or_holds_the_wrong_sign_to_be_learned_from(tmp_path: Path, model_type: str) -> None:
    image = encoded(size=4)
    long = " ".join(["zebra", *WORDS] * 200)  # above SentencePiece's own limit
    captions = [*CAPTIONS[:50], *[long] * 3, *["yak \u2585 yak"] * 30]
    members = [part for i, text in enumerate(captions) for part in ((f"{i}.jpg", image), (f"{i}.txt", text.encode()))]
    write_tar(tmp_path / "some" / "00000.tar", members)
    train_tokenizer(tmp_path / "some", tmp_path / "some.model", TokenizerSettings(model_type, 600))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "some.model"))
    # a letter that was never seen is a byte: z is in the long captions alone, y and k in those with the sign
    assert not any(map(processor.is_byte, processor.encode("zebra yak")))
    write_tar(tmp_path / "all" / "00000.tar", [("a.jpg", image), ("a.txt", long.encode())])
    assert train_tokenizer(tmp_path / "all", tmp_path / "all.model", TokenizerSettings(model_type, 600)) > 260


def test_captions_that_are_not_text_are_left_out_and_counted(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(shards, tmp_path / "tokenizer.model", TokenizerSettings(vocab_size=400))
    printed = capsys.readouterr().out
    assert f"from {len(CAPTIONS):,} captions" in printed
    assert re.search(r"not UTF-8 +2\b", printed)  # one in each shard


def test_refusals_keep_the_former_model(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokenizer.model"
    before = train(shards, output)
    with pytest.raises(UserError, match="260"):
        train(shards, output, vocab_size=260)
    write_tar(tmp_path / "empty" / "00000.tar", [("a.jpg", encoded())])
    with pytest.raises(UserError, match="no captions"):
        train(tmp_path / "empty", output)
    with pytest.raises(UserError, match="not a directory"):
        train(tmp_path / "absent", output)
    with pytest.raises(UserError, match="SentencePiece cannot train"):
        train(shards, output, vocab_size=262)
    assert output.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "tokenizer.model", "tokenizer.fertility.json"}


def test_special_tokens_stay_whole(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokenizer.model"
    train_tokenizer(shards, output, TokenizerSettings(vocab_size=400, special_tokens=("<PERSON>", "<date>")))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(output))
    assert [processor.id_to_piece(token) for token in (4, 5)] == ["<PERSON>", "<date>"]
    assert processor.encode("A red <PERSON>, <date>", out_type=str).count("<PERSON>") == 1
    with pytest.raises(UserError, match="262"):
        train_tokenizer(shards, output, TokenizerSettings(vocab_size=262, special_tokens=("<PERSON>", "<date>")))


def words_and_bytes(captions: Sequence[str]) -> list[list[int]]:
    """A tokenizer that anyone can count: one token per ASCII word, one per byte of the others (token >= 128)."""
    return [
        [token for word in caption.split() for token in ([1] if word.isascii() else list(word.encode()))]
        for caption in captions
    ]


def test_fertility_by_hand() -> None:
    captions = ["a red circle", "é 日", "w " * 75, "w " * 76, "w " * 30, "w " * 31]
    report = fertility(captions, words_and_bytes, lambda token: token > 1)
    tokens = 3 + (2 + 3) + 75 + 76 + 30 + 31
    assert report.tokens_per_caption == pytest.approx(tokens / 6)
    assert report.tokens_per_word == pytest.approx(tokens / (3 + 2 + 75 + 76 + 30 + 31))
    assert report.byte_share == pytest.approx(5 / tokens)
    assert report.cut_share == {77: pytest.approx(1 / 6), 32: pytest.approx(3 / 6)}


@pytest.fixture(scope="module")
def merges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the form and size of CLIP's, in which only the word "red" has merges; capitals never occur."""
    capitals = [chr(code) for code in range(ord("A"), ord("Z") + 1)]
    signs = [chr(code) for code in range(0x100, 0x100 + 60)]  # stand for control characters
    filler = [f"{first}{second} {third}" for first in capitals for second in capitals for third in capitals + signs]
    pairs = [f"{first} {second}" for first in capitals for second in capitals]
    lines = ["#version: 0.2", "r e", "re d</w>", *pairs, *filler]
    path = tmp_path_factory.mktemp("merges") / "merges.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines[: 1 + MERGES]).encode()))
    return path


def test_clip_byte_pairs_by_hand(merges: Path) -> None:
    clip = ClipBytePairs.read(merges)
    red, letters, accent = clip.encode(["RED red", "&amp;re", "\u65e5"])
    assert red == [513, 513]
    assert not any(map(clip.is_byte, letters))
    assert len(accent) == 3  # three bytes of UTF-8
    assert all(clip.is_byte(token) for token in accent)


def test_trained_byte_pairs_are_a_file_of_clips_form(shards: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "tokenizer.gz", tmp_path / "again.gz"
    size = train_tokenizer(shards, first, TokenizerSettings("byte-pairs", 600))
    train_tokenizer(shards, again, TokenizerSettings("byte-pairs", 600))
    assert first.read_bytes() == again.read_bytes()
    header, *merges = gzip.decompress(first.read_bytes()).decode().split("\n")
    assert header.startswith("#version")
    assert size == 512 + len(merges) + 2 <= 600
    pieces = {merge.replace(" ", "") for merge in merges}
    assert {f"{word}</w>" for word in WORDS} <= pieces  # whole, at the end of a word
    pairs = ClipBytePairs([(a, b) for a, b in map(str.split, merges)])
    assert pairs.encode(["A RED Circle"]) == pairs.encode(["a red circle"])
    assert [len(ids) for ids in pairs.encode(["a red circle"])] == [3]
    report = json.loads((tmp_path / "tokenizer.fertility.json").read_text())
    assert report["this"]["byte_share"] == 0  # the umlaut's two bytes are a pair


def test_few_captions_give_few_byte_pairs_and_special_tokens_are_refused(shards: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokenizer.gz"
    assert 514 < train_tokenizer(shards, output, TokenizerSettings("byte-pairs")) < 8192
    with pytest.raises(UserError, match="--vocab-size must exceed 514"):
        train_tokenizer(shards, output, TokenizerSettings("byte-pairs", 514))
    with pytest.raises(UserError, match="--special-tokens"):
        train_tokenizer(shards, output, TokenizerSettings("byte-pairs", special_tokens=("<PERSON>",)))


def test_the_report_compares_with_clips_merges(
    shards: Path, tmp_path: Path, merges: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match="is not CLIP's"):
        train_tokenizer(shards, output, TokenizerSettings(vocab_size=400), clip_merges=shards / "00000.tar")
    train_tokenizer(shards, output, TokenizerSettings(vocab_size=400), clip_merges=merges)
    assert "CLIP's" in capsys.readouterr().out
    report = json.loads(output.with_suffix(".fertility.json").read_text())
    assert report["captions"] == len(CAPTIONS)
    assert report["CLIP's"]["byte_share"] > 0.05  # the two bytes of the umlaut
    assert report["this"]["byte_share"] == 0
    assert report["this"]["tokens_per_word"] < report["CLIP's"]["tokens_per_word"]
