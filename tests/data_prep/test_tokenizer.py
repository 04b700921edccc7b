from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import sentencepiece
from make_images import encoded, write_tar

from data_prep.errors import UserError
from data_prep.tokenizer import train_tokenizer

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
    train_tokenizer(shards, output, "unigram", vocab_size, max_captions, seed)
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
        size = train_tokenizer(shards, tmp_path / "tokenizer.model", model_type, 8192, 10_000, 0)
        assert 260 < size < 8192


def test_byte_pairs_keep_frequent_words_whole(shards: Path, tmp_path: Path) -> None:
    train_tokenizer(shards, tmp_path / "tokenizer.model", "bpe", 600, 10_000, 0)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert processor.encode("a red circle", out_type=str) == ["▁a", "▁red", "▁circle"]


def test_equal_input_gives_an_equal_model(shards: Path, tmp_path: Path) -> None:
    assert train(shards, tmp_path / "a") == train(shards, tmp_path / "b")


def test_a_sample_of_the_captions_depends_on_the_seed(shards: Path, tmp_path: Path) -> None:
    first = train(shards, tmp_path / "a", max_captions=50, seed=0)
    assert train(shards, tmp_path / "b", max_captions=50, seed=0) == first
    assert train(shards, tmp_path / "c", max_captions=50, seed=1) != first


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
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "tokenizer.model"}
