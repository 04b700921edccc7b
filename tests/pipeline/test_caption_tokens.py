"""Start and end tokens, truncation, hashes, and CLIP's BPE on a merges file of our own."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.errors import UserError
from pipeline.data.captions import ClipBytePairs, load_tokenizer


def test_sentencepiece_captions_start_and_end(tokenizer_file: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_file), context_length=8)
    short, long = tokenizer.encode("a cat"), tokenizer.encode("picture number 3 of a dog " * 5)
    assert (short[0], short[-1]) == (2, 3)
    assert len(long) == 8
    assert long[-1] == 3
    batch = tokenizer.encode_batch(["a cat", "picture number 3 of a dog"])
    assert batch.shape == (2, 8)
    assert batch[0].tolist()[: len(short)] == short
    assert batch[0, len(short) :].eq(0).all()


def test_clip_byte_pairs_follow_the_merges(tmp_path: Path) -> None:
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(gzip.compress(b"#version: 0.2\nc a\nca t</w>\nd o\ndo g</w>\n"))
    tokenizer = load_tokenizer(str(path), context_length=77)
    vocabulary = tokenizer.encoder.vocab_size
    assert vocabulary == 2 * 256 + 4 + 2
    start, end = vocabulary - 2, vocabulary - 1
    cat, dog = 512 + 1, 512 + 3
    assert tokenizer.encode("  A CAT\n dog") == [start, 256 + ord("a") - ord("!"), cat, dog, end]
    # unmerged: a letter of its own, then the last letter with the end-of-word mark
    assert tokenizer.encode("cx") == [start, ord("c") - ord("!"), 256 + ord("x") - ord("!"), end]


@given(st.lists(st.text("ab'sdtllve 019!?.-\x00\x1f<|>&;éñ’ ", max_size=20), min_size=1, max_size=4))
def test_words_that_are_known_are_encoded_as_the_library_does(texts: list[str]) -> None:
    merges = gzip.compress(b"#version: 0.2\n' s</w>\na b\nab b</w>\nl l</w>\n! !\nd t\n")
    encoder = ClipBytePairs(merges)
    for text in (*texts, *texts):  # the second time from memory
        assert encoder.encode(text) == encoder.encode_with_spans(text).ids


def test_what_is_no_tokenizer_is_an_error(tmp_path: Path, tokenizer_file: Path) -> None:
    with pytest.raises(UserError, match="data-prep tokenizer"):
        load_tokenizer(str(tmp_path / "absent.model"), 8)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(UserError, match="neither a SentencePiece model nor"):
        load_tokenizer(str(tmp_path / "junk"), 8)
    with pytest.raises(UserError, match="open_clip_torch"):
        load_tokenizer("clip-bpe", 8)
    (tmp_path / "junk.gz").write_bytes(gzip.compress(b"\xff\xff"))
    with pytest.raises(UserError, match="neither a SentencePiece model nor"):
        load_tokenizer(str(tmp_path / "junk.gz"), 8)
