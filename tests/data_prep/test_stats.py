from __future__ import annotations

import base64
import io
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from make_images import encoded, good_sample, write_tar
from make_shards import make_shards
from PIL import Image, PngImagePlugin

from data_prep.__main__ import main
from data_prep.shards.stats import PERCENTILES, _describe
from data_prep.shards.verify import verify
from data_prep.shards.words import WordCounts, words_of

CAPTIONS = ["A cat, a CAT!", "the cat's _tail_ ’n’ l'été", "a1 b-2", "猫 と 猫", "x" * 30_000]
SIZES = [(20, 30), (40, 10), (64, 64), (8, 8), (33, 17)]


def test_words_are_counted_as_the_text_masking_reads_them(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    for number, caption in enumerate(CAPTIONS):
        write_tar(shards / f"{number:05d}.tar", [("0.jpg", encoded()), ("0.txt", caption.encode()), ("bad.txt", b"no")])
    verify(shards, 1, max_bad_ratio=1.0)
    output = tmp_path / "new" / "words.json"
    assert main(["words", str(shards), "--output", str(output), "--min-count", "2", "--processes", "2"]) == 0
    content = json.loads(output.read_text())
    expected = Counter(w for c in CAPTIONS for w in re.findall(r"[^\W_]+(?:'[^\W_]+)*", c.lower()))
    assert expected["cat's"] == expected["l'été"] == expected["tail"] == 1
    assert content["format_version"] == 1
    assert (content["captions"], content["words"]) == (len(CAPTIONS), expected.total())
    assert content["counts"] == {word: count for word, count in expected.items() if count >= 2}
    assert list(content["counts"].values()) == sorted(content["counts"].values(), reverse=True)
    assert [path.name for path in output.parent.iterdir()] == ["words.json"]


@given(st.text(max_size=40))
def test_words_are_letters_and_digits(text: str) -> None:
    for word in words_of(text):
        assert all(unicodedata.category(c)[0] in "LN" or c == "'" for c in word), word
        assert not word.startswith("'")
        assert not word.endswith("'")


@given(
    pieces=st.lists(st.dictionaries(st.text("abcé", min_size=1, max_size=2), st.integers(1, 9))), most=st.integers(0, 5)
)
def test_counts_that_do_not_fit_in_memory_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[dict[str, int]], most: int
) -> None:
    counts = WordCounts(tmp_path_factory.mktemp("words"), most_in_memory=most)
    expected = Counter[str]()
    for piece in pieces:
        counts.add(Counter(piece))
        expected.update(piece)
    assert list(counts) == sorted(expected.items())
    assert list(counts) == sorted(expected.items())  # and may be read again


def test_pictures_are_measured_as_they_are_seen(tmp_path: Path) -> None:
    """Turned upright, and whatever metadata they carry; the pages of pairs show them so, too."""
    exif, text, stream = Image.Exif(), PngImagePlugin.PngInfo(), io.BytesIO()
    exif[0x0112] = 6
    text.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    Image.new("RGB", (30, 20)).save(stream, "PNG", exif=exif, pnginfo=text)
    members = [(f"{n}.{kind}", content) for n in "01" for kind, content in (("png", stream.getvalue()), ("txt", b"a"))]
    write_tar(tmp_path / "shards" / "00000.tar", members)
    verify(tmp_path / "shards", 1, max_bad_ratio=0.0)
    assert main(["stats", str(tmp_path / "shards"), "--output", str(tmp_path / "stats"), "--processes", "1"]) == 0
    found = json.loads((tmp_path / "stats" / "stats.json").read_text())["distributions"]
    assert [found[name]["max"] for name in ("image_width", "image_height", "aspect_percent")] == [20, 30, 67]
    assert main(["dedup", str(tmp_path / "shards"), "--output", str(tmp_path / "pairs"), "--processes", "1"]) == 0
    shown = re.findall("data:image/jpeg;base64,([^\"']+)", (tmp_path / "pairs" / "report.html").read_text())
    assert [Image.open(io.BytesIO(base64.b64decode(each))).size for each in shown] == [(20, 30)] * 2


def test_a_folder_in_the_place_of_the_output_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "shards" / "00000.tar", good_sample("0"))
    verify(tmp_path / "shards", 1, max_bad_ratio=0.0)
    output = tmp_path / "words.json"
    output.mkdir()
    assert main(["words", str(tmp_path / "shards"), "--output", str(output), "--processes", "1"]) == 2
    assert f"error: {output}: is a folder where a file is needed" in capsys.readouterr().err


def test_distributions(tmp_path: Path, tokenizer_file: Path) -> None:
    shards = tmp_path / "shards"
    for number, (caption, size) in enumerate(zip(CAPTIONS, SIZES, strict=True)):
        stream = io.BytesIO()
        Image.new("RGB", size).save(stream, "PNG")
        members = [("0.png", stream.getvalue()), ("0.txt", caption.encode()), ("bad.txt", b"not counted")]
        write_tar(shards / f"{number:05d}.tar", members)
    verify(shards, 1, max_bad_ratio=1.0)
    output = tmp_path / "stats"
    arguments = ["stats", str(shards), "--output", str(output), "--tokenizer", str(tokenizer_file), "--processes", "2"]
    assert main(arguments) == 0
    content = json.loads((output / "stats.json").read_text())
    assert (content["samples"], content["shards"]) == (5, 5)
    found = content["distributions"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_file))
    values = {
        "caption_characters": [min(len(c), 20_000) for c in CAPTIONS],
        "caption_words": [len(words_of(c)) for c in CAPTIONS],
        "caption_tokens": [min(len(processor.encode(c)), 20_000) for c in CAPTIONS],
        "image_width": [w for w, _ in SIZES],
        "image_height": [h for _, h in SIZES],
        "aspect_percent": [round(100 * w / h) for w, h in SIZES],
    }
    for name, of in values.items():
        assert found[name]["mean"] == pytest.approx(np.mean(of), abs=1e-3)
        assert (found[name]["min"], found[name]["max"]) == (min(of), max(of))
        assert found[name]["percentiles"]["50"] == sorted(of)[2]
    assert content["top_words"]["cat"] == 2
    page = (output / "stats.html").read_text()
    assert page.count('media="(prefers-color-scheme: dark)"') == len(found)
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_percentiles_are_those_of_numpy(values: list[int]) -> None:
    found = _describe(Counter(values))
    for percentile in PERCENTILES:
        expected = np.percentile(values, percentile, method="inverted_cdf")
        assert found["percentiles"][str(percentile)] == expected


def test_a_model_that_is_none_is_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = make_shards(tmp_path / "shards", [1])
    (tmp_path / "model").write_bytes(b"no model")
    arguments = ["stats", str(shards), "--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "model")]
    assert main(arguments) == 2
    assert "not a SentencePiece model" in capsys.readouterr().err.splitlines()[-1]
