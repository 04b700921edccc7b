"""CLIP's byte pairs see captions cleaned: the same text, however it was written, gets the same ids."""

from __future__ import annotations

import gzip

import pytest

from pipeline.data.captions import tokenizer_from_bytes


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("fish &amp; chips", "fish & chips"),
        ("it&amp;#39;s", "it's"),
        ("the dog’s “bone”", 'the dog\'s "bone"'),
        ("cafe\u0301", "caf\u00e9"),
        ("  Two\u00a0\u3000lines\n", "two lines"),
        ("\u0391\u03a3", "\u03b1\u03c2"),  # a capital sigma at the end of a word
    ],
)
def test_spelling_does_not_matter(written: str, meant: str) -> None:
    tokenizer = tokenizer_from_bytes(gzip.compress(b"#version: 0.2\na b\n"), 77, "merges")
    assert tokenizer.encode(written) == tokenizer.encode(meant)
    assert tokenizer.encode(meant) != tokenizer.encode("a b")
