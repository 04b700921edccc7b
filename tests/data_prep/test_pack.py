from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_images import encoded

from data_prep.__main__ import main
from data_prep.shards.verify import verify
from data_prep.synthetic.evaluation_sets import write_classification_set, write_retrieval_set
from formats.errors import UserError
from formats.tar import TarSamples

PICTURES = [encoded(0), encoded(1, kind="PNG"), encoded(2, kind="WEBP")]
CAPTIONS = [["one", "uno"], ["two"], ["three", "drei\nzeilen"]]


def samples(directory: Path) -> list[dict[str, bytes]]:
    return [sample.members for path in sorted(directory.glob("*.tar")) for sample in TarSamples(path)]


def write_parquet(path: Path, **columns: Any) -> Path:
    table = {"image": PICTURES, "captions": CAPTIONS, "filename": ["1.jpg", "2.png", "3.webp"]} | columns
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), path)
    return path


def write_folder(folder: Path) -> Path:
    for index, (image, extension) in enumerate(zip(PICTURES, ("jpg", "png", "webp"), strict=True)):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        (folder / "sub" / f"{index}.{extension}").write_bytes(image)
        (folder / "sub" / f"{index}.txt").write_text(CAPTIONS[index][0] + "\n")
    return folder


def write_csv(folder: Path, name: str) -> Path:
    write_folder(folder / "pictures")
    with (folder / name).open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t" if name.endswith("tsv") else ",")
        table.writerow(["caption", "image"])
        for index, extension in enumerate(("jpg", "png", "webp")):
            table.writerow([CAPTIONS[index][0], f"pictures/sub/{index}.{extension}"])
    return folder / name


@pytest.mark.parametrize("kind", ["folder", "csv", "tsv", "parquet", "struct parquet"])
def test_every_source_gives_the_same_shards(tmp_path: Path, kind: str) -> None:
    if kind == "folder":
        source = write_folder(tmp_path / "source")
    elif kind.endswith("parquet"):
        images = [{"bytes": image, "path": "x"} for image in PICTURES] if kind.startswith("struct") else PICTURES
        source = write_parquet(tmp_path / "source.parquet", image=images)
    else:
        source = write_csv(tmp_path, f"list.{kind}")
    output = tmp_path / "shards"
    assert main(["pack", str(source), "--output", str(output), "--samples-per-shard", "2"]) == 0
    packed = samples(output)
    assert [sample["txt"].decode() for sample in packed] == ["one", "two", "three"]
    for sample, image, extension in zip(packed, PICTURES, ("jpg", "png", "webp"), strict=True):
        assert sample[extension] == image  # as it was, byte by byte
        assert json.loads(sample["json"])["filename"].endswith(extension)
    assert verify(output, 1, max_bad_ratio=0.0)
    assert json.loads((output / "dataset.json").read_text())["shards"] == 2


def test_each_caption_becomes_a_sample(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source.parquet")
    assert main(["pack", str(source), "--output", str(tmp_path / "out"), "--captions", "each"]) == 0
    assert [sample["txt"].decode() for sample in samples(tmp_path / "out")] == [
        "one", "uno", "two", "three", "drei\nzeilen",
    ]  # fmt: skip


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source.parquet")
    for name in ("a", "b"):
        main(["pack", str(source), "--output", str(tmp_path / name)])
    assert (tmp_path / "a" / "00000.tar").read_bytes() == (tmp_path / "b" / "00000.tar").read_bytes()


def test_what_cannot_be_packed_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.jpg").write_bytes(encoded())
    (tmp_path / "page.jpg").write_bytes(b"<html>")
    (tmp_path / "list.csv").write_text("image,caption\ngood.jpg,yes\npage.jpg,x\nabsent.jpg,x\ngood.jpg,\n")
    assert main(["pack", str(tmp_path / "list.csv"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 samples" in printed
    for reason in ("image cannot be read", "not a JPEG, PNG or WebP", "no caption"):
        assert reason in printed
    assert len(samples(tmp_path / "out")) == 1


def read_webdataset(directory: Path) -> list[dict[str, Any]]:
    """An evaluation set as CLIP_benchmark reads it."""
    shards = int((directory / "test" / "nshards.txt").read_text())
    urls = [str(directory / "test" / f"{index}.tar") for index in range(shards)]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").rename(image="jpg;png;webp")
    return list(dataset)


def test_retrieval_set_has_all_captions_one_per_line(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source.parquet")
    assert main(["pack", str(source), "--output", str(tmp_path / "out"), "--as", "retrieval"]) == 0
    read = read_webdataset(tmp_path / "out")
    assert [sample["txt"].split("\n") for sample in read] == [["one", "uno"], ["two"], ["three", "drei zeilen"]]
    assert all(sample["image"].size == (24, 24) for sample in read)


@pytest.fixture
def label_files(tmp_path: Path) -> list[str]:
    (tmp_path / "classes.txt").write_text("red fox\ncat\n\n")
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    return [
        "--label-column", "label",
        "--classnames", str(tmp_path / "classes.txt"),
        "--templates", str(tmp_path / "templates.txt"),
    ]  # fmt: skip


@pytest.mark.parametrize("labels", [["cat", "red fox", "cat"], [1, 0, 1], ["1.0", "0.0", "1"]])
def test_classification_set_from_names_or_numbers(tmp_path: Path, label_files: list[str], labels: list[Any]) -> None:
    source = write_parquet(tmp_path / "source.parquet", captions=None, label=labels)
    output = tmp_path / "out"
    assert main(["pack", str(source), "--output", str(output), "--as", "classification", *label_files]) == 0
    assert [sample["cls"] for sample in read_webdataset(output)] == [1, 0, 1]
    assert (output / "classnames.txt").read_text() == "red fox\ncat\n"
    templates = (output / "zeroshot_classification_templates.txt").read_text()
    assert templates == "a photo of a {c}.\nthe {c}\n"


def test_captions_drawn_from_templates_depend_on_the_seed_alone(tmp_path: Path, label_files: list[str]) -> None:
    source = write_parquet(
        tmp_path / "source.parquet",
        image=PICTURES * 10,
        captions=None,
        filename=None,
        label=["cat", "red fox", "cat"] * 10,
    )
    drawn = {}
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        main(["pack", str(source), "--output", str(tmp_path / name), "--seed", seed, *label_files])
        drawn[name] = [sample["txt"].decode() for sample in samples(tmp_path / name)]
    assert drawn["a"] == drawn["b"] != drawn["c"]
    assert set(drawn["a"]) == {"a photo of a cat.", "the cat", "a photo of a red fox.", "the red fox"}
    assert all(("cat" in caption) == (index % 3 != 1) for index, caption in enumerate(drawn["a"]))


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused with one line; returns the line."""
    capsys.readouterr()
    assert main(arguments) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_refusals_say_what_to_do_and_leave_nothing(
    tmp_path: Path, label_files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(write_parquet(tmp_path / "source.parquet", label=["cat", "dog", "cat"]))
    bad = write_parquet(tmp_path / "bad.parquet", image=[b"a", b"b", b"c"])
    output = ["--output", str(tmp_path / "out")]
    assert "did you mean 'image'" in refusal(["pack", source, *output, "--image-column", "imag"], capsys)
    captionless = str(write_parquet(tmp_path / "x.parquet", captions=None))
    assert "--caption-column" in refusal(["pack", captionless, *output], capsys)
    sized = str(write_parquet(tmp_path / "sized.parquet", width=[1, 2, 3]))
    assert "neither image bytes nor paths" in refusal(["pack", sized, *output, "--image-column", "width"], capsys)
    assert "'dog'" in refusal(["pack", source, *output, *label_files], capsys)
    assert "with --label-column which" in refusal(["pack", source, *output, "--as", "classification"], capsys)
    assert "name its classes with --classnames" in refusal(["pack", source, *output, *label_files[:2]], capsys)
    assert "3 × not a JPEG" in refusal(["pack", str(bad), *output], capsys)
    assert "no such file" in refusal(["pack", str(tmp_path / "absent"), *output], capsys)
    (tmp_path / "empty").mkdir()
    assert "no image" in refusal(["pack", str(tmp_path / "empty"), *output], capsys)
    assert not list(tmp_path.glob("out*"))


def test_a_folder_with_content_is_replaced_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(write_parquet(tmp_path / "source.parquet"))
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("x")
    assert "--overwrite" in refusal(["pack", source, "--output", str(output)], capsys)
    bad = str(write_parquet(tmp_path / "bad.parquet", image=[b"", b"", b""]))
    refusal(["pack", bad, "--output", str(output), "--overwrite"], capsys)
    assert (output / "precious").exists()  # a failed run has replaced nothing
    assert main(["pack", source, "--output", str(output), "--overwrite"]) == 0
    assert not (output / "precious").exists()
    assert len(samples(output)) == 3


def test_the_source_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "source")
    for output in (folder, tmp_path):
        assert "holds the source" in refusal(["pack", str(folder), "--output", str(output), "--overwrite"], capsys)
    assert len(list(folder.rglob("*.*"))) == 6


def test_evaluation_sets_have_a_plain_layout_and_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        written = write_retrieval_set(tmp_path / name, ((image, ["x"]) for image in PICTURES), samples_per_shard=2)
        assert written == 3
    assert (tmp_path / "a/test/nshards.txt").read_text() == "2\n"
    for shard in ("0.tar", "1.tar"):
        assert (tmp_path / "a/test" / shard).read_bytes() == (tmp_path / "b/test" / shard).read_bytes()
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "a/test/0.tar").read_bytes())) as tar:
        assert tar.getnames() == ["s0000000.jpg", "s0000000.txt", "s0000001.png", "s0000001.txt"]
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}


def test_evaluation_sets_refuse_what_cannot_be_evaluated(tmp_path: Path) -> None:
    image = encoded()
    with pytest.raises(UserError, match="class 2"):
        write_classification_set(tmp_path / "a", [(image, 2)], ["x", "y"], ["{c}"])
    with pytest.raises(UserError, match=r"\{c\}"):
        write_classification_set(tmp_path / "b", [(image, 0)], ["x"], ["a photo"])
    with pytest.raises(UserError, match="caption"):
        write_retrieval_set(tmp_path / "c", [(image, ["fine", " "])])
    with pytest.raises(UserError, match="sample 1 is not"):
        write_retrieval_set(tmp_path / "d", [(image, ["fine"]), (b"GIF89a", ["x"])])
    assert not list(tmp_path.rglob("nshards.txt"))


def write_images(folder: Path, *names: str) -> None:
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(index))


@pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.jsonl", "list.json", "list.parquet", "parts"])
def test_tables_of_every_kind_may_hold_paths(tmp_path: Path, name: str) -> None:
    write_images(tmp_path, "p/0.jpg", "p/1.jpg")
    rows = [{"file_name": f"p/{index}.jpg", "text": f'a "{index}", b', "id": index} for index in range(2)]
    path = tmp_path / name
    if name.endswith("sv"):
        quoted = [f'"{row["text"]}"'.replace('"', '""')[1:-1] if name == "list.csv" else row["text"] for row in rows]
        mark = "," if name == "list.csv" else "\t"
        lines = [mark.join((row["file_name"], text)) for row, text in zip(rows, quoted, strict=True)]
        path.write_text("\n".join([mark.join(("FILE_NAME", "text")), *lines]))
    elif name == "parts":
        rows = [row | {"file_name": f"../{row['file_name']}"} for row in rows]
        path.mkdir()
        for index, row in enumerate(rows):
            pq.write_table(pa.table({key: [value] for key, value in row.items()}), path / f"part-{index}.parquet")
    elif name == "list.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if name == "list.jsonl" else json.dumps(rows, indent=1))
    assert main(["pack", str(path), "--output", str(tmp_path / "out")]) == 0
    assert [sample["txt"].decode() for sample in samples(tmp_path / "out")] == ['a "0", b', 'a "1", b']
    assert [sample["jpg"] for sample in samples(tmp_path / "out")] == [encoded(0), encoded(1)]


def counts(printed: str, title: str = "dropped") -> dict[str, int]:
    """The table of what was dropped, as printed."""
    lines = printed.partition(f"  {title}")[2].splitlines()[1:]
    return {line.rsplit(maxsplit=1)[0].strip(): int(line.rsplit(maxsplit=1)[1]) for line in lines if line[:2] == "  "}


def test_every_file_of_a_folder_is_packed_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    captions = {
        "good.jpg": b"\xef\xbb\xbfone \n", "old.JFIF": b"two", "older.jpe": b"three", "utf16.jpg": "x".encode("utf-16"),
        "latin.jpg": b"caf\xe9", "mark.jpg": b"\xef\xbb\xbf", "blank.jpg": "\N{ZERO WIDTH SPACE}".encode(),
        "zero.jpg": b"\0", "a.gif": b"x", "b.bmp": b"x", "c.heic": b"x", "d.heic": b"x",
    }  # fmt: skip
    write_images(source, *captions, "alone.jpg", "sub/deep.jpg")
    for name, text in captions.items():
        (source / name).with_suffix(".txt").write_bytes(text)
    (source / "cut.jpg").write_bytes(encoded(size=64)[:300])
    (source / "cut.txt").write_text("cut")
    (source / "orphan.txt").write_text("no picture")
    (source / "notes").write_text("no ending")
    write_images(source, "._good.jpg", ".hidden/x.jpg")
    assert main(["pack", str(source), "--output", str(tmp_path / "out")]) == 0
    assert sorted(sample["txt"] for sample in samples(tmp_path / "out")) == [b"one", b"three", b"two"]
    printed = capsys.readouterr().out
    dropped = counts(printed)
    assert dropped == {
        "caption is not UTF-8": 2, "no caption": 5, "not a JPEG, PNG or WebP: *.gif": 1,
        "not a JPEG, PNG or WebP: *.bmp": 1, "not a JPEG, PNG or WebP: *.heic": 2,
        "not a JPEG, PNG or WebP: * without an ending": 1, "image does not decode": 1, "caption without a picture": 1,
    }  # fmt: skip
    assert f"3 samples of {3 + sum(dropped.values())} files" in printed
    step = json.loads((tmp_path / "out" / "provenance.jsonl").read_text())
    assert (step["dropped"], step["read"]) == (dropped, 3 + sum(dropped.values()))


def test_links_are_followed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "elsewhere")
    source = tmp_path / "source"
    source.mkdir()
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "again").symlink_to(source)
    (source / "broken.jpg").symlink_to(tmp_path / "absent.jpg")
    (source / "broken.txt").write_text("x")
    assert main(["pack", str(source), "--output", str(tmp_path / "out")]) == 0
    assert len(samples(tmp_path / "out")) == 3
    assert counts(capsys.readouterr().out) == {"image cannot be read": 1}


def test_every_row_of_a_table_is_packed_or_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(tmp_path, "a.jpg")
    (tmp_path / "b.gif").write_bytes(b"GIF89a")
    image: list[object] = [
        "a.jpg",
        "b.gif",
        "absent.jpg",
        "",
        None,
        "http://a.example/a.jpg",
        "\0.jpg",
        ".",
        7,
        "a.jpg",
    ]
    rows: list[object] = [{"image": value, "caption": "x"} for value in image]
    texts = [7, ["p", None, "q"], {"en": "x"}, True, [["x"]], "\ud800", None, "\N{ZERO WIDTH SPACE}", [], float("nan")]
    rows += [{"image": "a.jpg", "caption": value} for value in texts]
    rows += [[1], "x"]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{\n")
    assert main(["pack", str(tmp_path / "l.jsonl"), "--output", str(tmp_path / "out"), "--captions", "each"]) == 0
    assert [sample["txt"].decode() for sample in samples(tmp_path / "out")] == ["x", "x", "7", "p", "q"]
    printed = capsys.readouterr().out
    dropped = counts(printed)
    assert dropped == {
        "not a JPEG, PNG or WebP: *.gif": 1, "image cannot be read": 3, "no image": 3, "caption is no text": 3,
        "a url, which data-prep ingest and download are for": 1, "not UTF-8": 1, "no caption": 4, "malformed line": 3,
    }  # fmt: skip
    assert f"5 samples of {4 + sum(dropped.values())} rows" in printed


def test_rows_of_one_picture_are_one_picture_of_a_retrieval_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    rows = ["image,caption", "a.jpg,one", "b.jpg,two", "a.jpg,", "./a.jpg,three", "absent.jpg,x", "b.jpg,four"]
    (tmp_path / "l.csv").write_text("\n".join(rows))
    images = [encoded(0), encoded(1), encoded(0), encoded(1)]
    pq.write_table(pa.table({"image": images, "caption": ["one", "two", "three", "four"]}), tmp_path / "l.parquet")
    for name, read, joined in (("l.csv", 6, 2), ("l.parquet", 4, 2)):
        output = tmp_path / f"{name}.set"
        assert main(["pack", str(tmp_path / name), "--as", "retrieval", "--output", str(output)]) == 0
        assert [sample["txt"] for sample in read_webdataset(output)] == ["one\nthree", "two\nfour"]
        assert f"2 samples of {read} rows, {joined} of them joined" in capsys.readouterr().out


def test_class_folders_are_a_classification_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "val", tmp_path / "out"
    write_images(source, "n02/a.jpg", "n01/deeper/b.jpg", "n02/c.JPEG", "d.jpg")
    pack = ["pack", str(source), "--output", str(output), "--overwrite", "--as", "classification"]

    def packed() -> tuple[list[int], list[str]]:
        names = (output / "classnames.txt").read_text().splitlines()
        return [sample["cls"] for sample in read_webdataset(output)], names

    assert main(pack) == 0
    assert packed() == ([0, 1, 1], ["n01", "n02"])
    assert (output / "zeroshot_classification_templates.txt").read_text() == "a photo of a {c}.\n"
    assert counts(capsys.readouterr().out) == {"no label": 1}
    (source / "n02/a.txt").write_bytes("not looked at".encode("utf-16"))
    (source / "n02/z.txt").write_text("nor missed")
    names = tmp_path / "names.txt"
    for content, expected in (("cat\ndog\n", [0, 1, 1]), ("n02\nn03\nn01\n", [2, 0, 0])):  # by order, by name
        names.write_text(content)
        assert main([*pack, "--classnames", str(names)]) == 0
        assert packed() == (expected, content.split())
        assert ("no picture of 1 classes (n03)" in capsys.readouterr().out) == ("n03" in content)
    names.write_text("cat\ndog\nfox\n")
    assert "2 class folders" in refusal([*pack, "--classnames", str(names)], capsys)
    assert "drop the names of columns" in refusal([*pack, "--label-column", "label"], capsys)
    training = ["pack", str(source), "--output", str(tmp_path / "shards"), "--templates", str(names)]
    assert "'cat' has no {c}" in refusal(training, capsys)
    names.write_text("a {c}\n")
    assert main(training) == 0
    assert [sample["txt"] for sample in samples(tmp_path / "shards")] == [b"a n01", b"a n02", b"a n02"]


CELLS = [
    *("a.jpg", "./a.jpg", "absent.jpg", "", "x", "two words"),
    *('"', ",", "\n", "\r\n", '"a.jpg"', "\ufeff", "\0"),
]
OBJECTS = st.dictionaries(st.sampled_from(["image", "caption"]), st.sampled_from(CELLS)).map(json.dumps)
TABLES = st.one_of(
    st.tuples(st.just("csv"), st.lists(st.sampled_from(CELLS)).map(lambda cells: "image,caption\n" + ",".join(cells))),
    st.tuples(
        st.just("tsv"), st.lists(st.sampled_from(CELLS)).map(lambda cells: "image\tcaption\n" + "\t".join(cells))
    ),
    st.tuples(st.just("jsonl"), st.lists(OBJECTS).map(lambda rows: "\n".join(['{"image": 1, "caption": 1}', *rows]))),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TABLES, st.sampled_from(["training", "retrieval"]))
def test_every_row_of_any_table_is_a_sample_joined_or_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: tuple[str, str], layout: str
) -> None:
    kind, content = table
    write_images(tmp_path, "a.jpg")
    (tmp_path / f"l.{kind}").write_text(content)
    capsys.readouterr()
    arguments = [str(tmp_path / f"l.{kind}"), "--output", str(tmp_path / "out"), "--as", layout, "--overwrite"]
    code = main(["pack", *arguments])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    if code == 0:
        line = printed.out.splitlines()[0].rpartition("/out: ")[2]
        taken, read, *joined = map(int, re.findall(r"\d+", line))
        assert read == taken + sum(joined) + sum(counts(printed.out).values())
