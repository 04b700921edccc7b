"""Readers of the three evaluation layouts: what they return, and one clear line for whatever does not fit."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from formats.errors import UserError
from pipeline.evaluation.sets.composition import CompositionSet, GroupSet
from pipeline.evaluation.sets.known import KNOWN_SETS, all_class_names, set_key
from pipeline.evaluation.sets.layouts import (
    ClassificationSet,
    MultiLabelSet,
    RetrievalSet,
    check_names,
    open_evaluation_set,
)

Members = Sequence[tuple[str, bytes]]
Damage = Callable[[Path], object]


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_test_split(directory: Path, shards: Sequence[Members]) -> None:
    for index, members in enumerate(shards):
        write_tar(directory / "test" / f"{index}.tar", members)
    (directory / "test" / "nshards.txt").write_text(f"{len(shards)}\n")


def write_classification_set(directory: Path) -> None:
    write_test_split(
        directory,
        [[("a.png", png()), ("a.cls", b"1")], [("b.png", png()), ("b.cls", b"0\n"), ("b.json", b"{}")]],
    )
    (directory / "classnames.txt").write_text("red square\nblue disc\n")
    (directory / "zeroshot_classification_templates.txt").write_text("a {c}.\na photo of a {c}.\n")


def write_composition_set(directory: Path) -> None:
    (directory / "images").mkdir(parents=True)
    (directory / "images" / "1.png").write_bytes(png())
    entry = {"filename": "1.png", "caption": "a red cat", "negative_caption": "a blue cat"}
    (directory / "replace_att.json").write_text(json.dumps({"0": entry, "1": entry}))
    (directory / "swap_obj.json").write_text(json.dumps({"0": entry | {"negative_caption": "cat red a"}}))


def test_classification_set(tmp_path: Path) -> None:
    write_classification_set(tmp_path / "shapes")
    dataset = open_evaluation_set(tmp_path / "shapes")
    assert isinstance(dataset, ClassificationSet)
    assert dataset.name == "shapes"
    assert dataset.class_names == ("red square", "blue disc")
    assert dataset.templates == ("a {c}.", "a photo of a {c}.")
    assert [sample.label for sample in dataset.samples] == [1, 0]
    assert all(sample.image.read() == png() for sample in dataset.samples)


def test_retrieval_set_with_several_captions(tmp_path: Path) -> None:
    write_test_split(
        tmp_path,
        [[("b.JPG", png((9, 8, 7))), ("b.txt", "one dög\n\n two \n".encode()), ("a.webp", png()), ("a.txt", b"x")]],
    )
    dataset = open_evaluation_set(tmp_path)
    assert isinstance(dataset, RetrievalSet)
    assert [sample.captions for sample in dataset.samples] == [("one dög", "two"), ("x",)]
    assert [sample.image.read() for sample in dataset.samples] == [png((9, 8, 7)), png()]


def test_composition_set(tmp_path: Path) -> None:
    write_composition_set(tmp_path)
    dataset = open_evaluation_set(tmp_path)
    assert isinstance(dataset, CompositionSet)
    assert [sample.category for sample in dataset.samples] == ["replace_att", "replace_att", "swap_obj"]
    assert dataset.samples[2].negative_caption == "cat red a"
    assert dataset.samples[0].image.read() == png()


def write_groups(directory: Path, **changed: object) -> None:
    (directory / "images").mkdir(parents=True)
    for number in range(2):
        (directory / "images" / f"{number}.png").write_bytes(png((number, 0, 0)))
    entry = {"image_0": "0.png", "image_1": "1.png", "caption_0": "a cat on a dog", "caption_1": "a dog on a cat"}
    (directory / "groups.json").write_text(json.dumps({"0": entry, "1": entry | changed}))


def test_group_set(tmp_path: Path) -> None:
    write_groups(tmp_path)
    dataset = open_evaluation_set(tmp_path)
    assert isinstance(dataset, GroupSet)
    assert len(dataset.samples) == 2
    assert dataset.samples[1].captions == ("a cat on a dog", "a dog on a cat")
    assert [image.read() for image in dataset.samples[1].images] == [png((0, 0, 0)), png((1, 0, 0))]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"caption_1": 3}, "entry 1: expected strings image_0, image_1, caption_0 and caption_1"),
        ({"image_1": "2.png"}, r"entry 1: missing image .*2\.png"),
    ],
)
def test_damaged_group_set(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    write_groups(tmp_path, **changed)
    with pytest.raises(UserError, match=rf"groups\.json, {message}"):
        open_evaluation_set(tmp_path)


def npy(values: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, **options))  # type: ignore[call-overload]
    return buffer.getvalue()


def write_multi_label_set(directory: Path, second: bytes) -> None:
    write_test_split(directory, [[("a.png", png()), ("a.npy", npy([1, 0, 1]))], [("b.png", png()), ("b.npy", second)]])
    (directory / "dataset_type.txt").write_text("multilabel\n")
    (directory / "classnames.txt").write_text("cat\ndog\nperson\n")
    (directory / "zeroshot_classification_templates.txt").write_text("a {c}.\n")


def test_multi_label_set(tmp_path: Path) -> None:
    write_multi_label_set(tmp_path, npy([False, True, False]))
    dataset = open_evaluation_set(tmp_path)
    assert isinstance(dataset, MultiLabelSet)
    assert [sample.labels for sample in dataset.samples] == [(0, 2), (1,)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (npy([0, 1]), r"holds \(2,\) values of int64, expected 3 numbers"),
        (npy([[0, 1, 0]]), r"holds \(1, 3\) values"),
        (npy([0, 1, 2]), "other values than 0 and 1"),
        (npy([0, 1, 1])[:-8], r"holds \(3,\) values of int64, expected"),
        (npy([0, 1, 1]).replace(b"(3,)", b"(9,)"), r"holds \(9,\) values"),
        (npy([None, 1, 1], dtype=object), r"holds \(3,\) values of object"),
        (b"\x80\x04N.", "its .npy member"),
        (b"\x93NUMPY\x02\x00", "is not of format 1.0"),
        (npy([1, 0, 1]), "names class 1 .dog., of which"),
        (npy([1, 1, 1]) + bytes(2**20), "too long for a .npy"),
    ],
)
def test_damaged_multi_label_set(tmp_path: Path, labels: bytes, message: str) -> None:
    write_multi_label_set(tmp_path, labels)
    with pytest.raises(UserError, match=message) as failure:
        open_evaluation_set(tmp_path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", ["a.pyd", "pic.v2.0001.jpg", "b.pickle", "a.jpg.txt", "sub/c.gif", "d."])
def test_a_member_that_is_not_understood_is_named(name: str, tmp_path: Path) -> None:
    """Left out, it could be a sample, and the figure one of a part of the set."""
    write_test_split(tmp_path, [[("a.png", png()), ("a.txt", b"x"), (name, b"\x80")]])
    with pytest.raises(UserError, match=rf"^{name} in .*test/0\.tar: members of type .* are not understood"):
        open_evaluation_set(tmp_path)


def test_what_file_systems_leave_behind_is_no_member(tmp_path: Path) -> None:
    notes = [(name, b"\0\5\x16\7") for name in ("._a.png", "__MACOSX/._a.png", ".DS_Store", "README")]
    write_test_split(tmp_path, [[*notes, ("a.png", png()), ("._a.txt", b"\0"), ("a.txt", b"x"), ("a.json", b"{}")]])
    with tarfile.open(tmp_path / "test" / "0.tar", "a") as tar:
        folder = tarfile.TarInfo("pictures.of.mine")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    (sample,) = open_evaluation_set(tmp_path).samples
    assert sample.captions == ("x",)  # type: ignore[union-attr]


def test_what_file_systems_leave_behind_is_no_file_of_a_set(tmp_path: Path) -> None:
    write_composition_set(tmp_path / "crepe")
    (tmp_path / "crepe" / "._swap_obj.json").write_bytes(b"\0\5\x16\7")
    assert len(open_evaluation_set(tmp_path / "crepe").samples) == 3
    write_classification_set(tmp_path / "shapes")
    (tmp_path / "shapes" / "test" / "._0.tar").write_bytes(b"\0\5\x16\7")
    assert len(open_evaluation_set(tmp_path / "shapes").samples) == 2


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_for_a_picture_is_no_picture(kind: bytes, tmp_path: Path) -> None:
    write_test_split(tmp_path, [[("a.png", png()), ("a.txt", b"x")]])
    with tarfile.open(tmp_path / "test" / "0.tar", "a") as tar:
        for end in ("png", "txt"):
            link = tarfile.TarInfo(f"b.{end}")
            link.type, link.linkname = kind, f"a.{end}"
            tar.addfile(link)
    with pytest.raises(UserError, match=r"test/0\.tar holds 2 links or the like: pack it anew"):
        open_evaluation_set(tmp_path)


def _remove(name: str) -> Damage:
    return lambda directory: (directory / name).unlink()


def _write(name: str, text: str) -> Damage:
    return lambda directory: (directory / name).write_text(text)


def _shard(*members: tuple[str, bytes]) -> Damage:
    return lambda directory: write_tar(directory / "test" / "0.tar", members)


def _cut(bytes_left: int) -> Damage:
    def cut(directory: Path) -> None:
        path = directory / "test" / "0.tar"
        path.write_bytes(path.read_bytes()[:bytes_left])

    return cut


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("test/nshards.txt"), "nshards.txt: expected the number of shards"),
        (_write("test/nshards.txt", "two"), "must hold a positive integer"),
        (_write("test/nshards.txt", "0"), "must hold a positive integer"),
        (_write("test/nshards.txt", "1"), "holds 2 tars, but nshards.txt says 1"),
        (_remove("test/1.tar"), "missing shard .*1.tar"),
        (_remove("zeroshot_classification_templates.txt"), "missing .*templates.txt"),
        (_remove("classnames.txt"), "missing .*classnames.txt"),
        (_write("classnames.txt", ""), "classnames.txt is empty"),
        (_write("classnames.txt", "a\n\nb\n"), "line 2 is blank"),
        (_write("classnames.txt", "only one\n"), "'a' in .*0.tar has class 1, but classnames.txt names only"),
        (_write("zeroshot_classification_templates.txt", "a photo"), "'a photo' has no {c}"),
        (_shard(("a.png", b"x")), "no class index"),
        (_shard(("a.png", b"x"), ("a.cls", b"-1")), "no class index: .* found '-1'"),
        (_shard(("a.png", b"x"), ("a.cls", b"\xff")), "not UTF-8"),
        (_shard(("a.cls", b"1")), "has no image"),
        (_shard(("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")), "two images: a.png and a.jpg"),
        (_shard(("a.cls", b"1"), ("a.png", b"x"), ("a.cls", b"0")), r"two \.cls members"),
        (_write("test/0.tar", "<html>"), "cannot read .*0.tar"),
        (_cut(700), "cannot read .*0.tar"),
        (_cut(1024), "0.tar: cut off: it has no end-of-archive mark"),
        (_write("dataset.json", '{"samples": 3}'), "holds 2 samples, but its dataset.json says 3"),
        (_write("dataset.json", "{"), "is not JSON"),
        (_write("dataset_type.txt", "clasification"), "holds 'clasification': expected one of classification, "),
        (_write("test/nshards.txt", "9" * 5000), "must hold a positive integer"),
        (_shard(("a.png", b"x"), ("a.cls", b"7" * 5000)), "no class index"),
        (_write("classnames.txt", "a\n\u200b\nb"), "line 2 is blank"),
        (_write("dataset.json", '{"samples": "2"}'), r"dataset\.json: samples: "),
        (_write("dataset.json", '{"known_set": "cifar"}'), "known_set is 'cifar', expected one of imagenet1k, "),
        (_write("classnames.txt", "a\nb\nc\nd\n"), r"classnames\.txt names class 2 \(c\) and 1 more, of which"),
        (_write("dataset.json", '{"known_set": "vtab/cifar10"}'), "has 2 classes, but vtab/cifar10 has 10"),
    ],
)
def test_damaged_classification_set(tmp_path: Path, damage: Damage, message: str) -> None:
    write_classification_set(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as failure:
        open_evaluation_set(tmp_path)
    assert "\n" not in str(failure.value)


def test_classes_may_be_empty_on_purpose(tmp_path: Path) -> None:
    write_classification_set(tmp_path)
    (tmp_path / "classnames.txt").write_text("a\nb\nc\n")
    (tmp_path / "dataset.json").write_text('{"allow_empty_classes": true}')
    assert len(open_evaluation_set(tmp_path).samples) == 2


def captioned(count: int, captions: int = 5) -> list[Members]:
    text = "\n".join(f"caption {line}" for line in range(captions)).encode()
    return [[member for n in range(count) for member in ((f"{n}.png", png()), (f"{n}.txt", text))]]


@pytest.mark.parametrize(
    ("name", "samples", "captions", "message"),
    [
        ("wds_flickr8k", 1000, 1, r"'0' in .*test/0\.tar has 1 captions, but wds_flickr8k has 5 for each image"),
        ("flickr30k", 999, 5, "flickr30k has 999 samples, but flickr30k has 1,000: take the whole test split"),
    ],
)
def test_common_sets_are_known_by_their_names(
    tmp_path: Path, name: str, samples: int, captions: int, message: str
) -> None:
    write_test_split(tmp_path / name, captioned(samples, captions))
    with pytest.raises(UserError, match=message):
        open_evaluation_set(tmp_path / name)
    (tmp_path / name / "dataset.json").write_text('{"known_set": false}')
    dataset = open_evaluation_set(tmp_path / name)
    assert (len(dataset.samples), dataset.expected_samples) == (samples, None)


def test_a_common_set_that_is_whole_states_its_size(tmp_path: Path) -> None:
    write_test_split(tmp_path / "mine", captioned(1000))
    (tmp_path / "mine" / "dataset.json").write_text('{"known_set": "flickr8k"}')
    assert open_evaluation_set(tmp_path / "mine").expected_samples == 1000


def test_captions_per_image_as_dataset_json_says(tmp_path: Path) -> None:
    write_test_split(tmp_path, captioned(3, captions=4))
    (tmp_path / "dataset.json").write_text('{"captions_per_image": 4}')
    assert len(open_evaluation_set(tmp_path).samples) == 3
    (tmp_path / "dataset.json").write_text('{"captions_per_image": 5}')
    with pytest.raises(UserError, match=r"'0' in .*0\.tar has 4 captions, but dataset\.json says 5 for each image"):
        open_evaluation_set(tmp_path)


@pytest.mark.parametrize("name", ["wds_vtab-cifar10", "vtab/cifar10", "CIFAR-10", "cifar10"])
def test_names_of_one_set(name: str) -> None:
    assert set_key(name) == "cifar10"
    assert all(set_key(key) == key for key in KNOWN_SETS)


def test_common_sets_need_no_class_names(tmp_path: Path) -> None:
    labelled = [member for n in range(20) for member in ((f"{n}.png", png()), (f"{n}.cls", str(n % 10).encode()))]
    write_test_split(tmp_path / "wds_vtab-cifar10", [labelled])
    with pytest.raises(UserError, match="has 20 samples, but wds_vtab-cifar10 has 10,000"):
        open_evaluation_set(tmp_path / "wds_vtab-cifar10")
    (tmp_path / "wds_vtab-cifar10" / "dataset.json").write_text('{"known_set": false}')
    dataset = open_evaluation_set(tmp_path / "wds_vtab-cifar10")
    assert isinstance(dataset, ClassificationSet)
    assert dataset.class_names[:2] == ("airplane", "automobile")
    assert dataset.templates == ("a photo of a {c}.",)
    (tmp_path / "wds_vtab-cifar10" / "classnames.txt").write_text("\n".join("abcdefghij"))
    named = open_evaluation_set(tmp_path / "wds_vtab-cifar10")
    assert isinstance(named, ClassificationSet)
    assert (named.class_names[0], named.templates) == ("a", dataset.templates)


def test_class_names_that_come_along_fit_the_known_sets() -> None:
    for key, names in all_class_names().items():
        assert len(names.classes) == len(set(names.classes)) == KNOWN_SETS[key].classes
        assert all("{c}" in template for template in names.templates)
        if "alphabetical" in names.order:
            plain = [name.lower().replace(" ", "_") for name in names.classes]
            assert plain == sorted(plain)


def test_let_it_wag_is_in_the_order_of_its_folders() -> None:
    names = [name.replace(" ", "_") for name in all_class_names()[set_key("wds_Let-It-Wag!")].classes]
    assert names == sorted(names)  # by bytes, capitals first, as ImageFolder sorts


def test_shards_without_samples(tmp_path: Path) -> None:
    write_test_split(tmp_path, [[]])
    with pytest.raises(UserError, match="hold no samples"):
        open_evaluation_set(tmp_path)


@pytest.mark.parametrize("members", [[("a.jpg", b"x")], [("a.jpg", b"x"), ("a.txt", b" \n")]])
def test_retrieval_sample_without_caption(tmp_path: Path, members: Members) -> None:
    write_test_split(tmp_path, [members])
    with pytest.raises(UserError, match=r"sample 'a' in .*0\.tar has no caption"):
        open_evaluation_set(tmp_path)


def test_classification_set_without_any_side_file_says_what_is_missing(tmp_path: Path) -> None:
    write_test_split(tmp_path, [[("a.jpg", b"x"), ("a.cls", b"0")]])
    with pytest.raises(UserError, match=r"needs classnames\.txt"):
        open_evaluation_set(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove("images/1.png"), "replace_att.json, entry 0: missing image .*1.png"),
        (_write("swap_obj.json", "{}"), "swap_obj.json is empty"),
        (_write("swap_obj.json", "[]"), "is not a JSON object"),
        (_write("swap_obj.json", '{"7": {"filename": "1.png", "caption": ""}}'), "entry 7: expected strings"),
        (
            _write("swap_obj.json", '{"0": {"filename": "../x", "caption": "a", "negative_caption": "b"}}'),
            "directly in images/",
        ),
    ],
)
def test_damaged_composition_set(tmp_path: Path, damage: Damage, message: str) -> None:
    write_composition_set(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        open_evaluation_set(tmp_path)


def test_directories_that_are_no_evaluation_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        open_evaluation_set(tmp_path / "absent")
    with pytest.raises(UserError, match="no evaluation set in"):
        open_evaluation_set(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="no categories in"):
        open_evaluation_set(tmp_path)


def test_an_image_over_the_byte_limit_is_not_read(tmp_path: Path) -> None:
    write_composition_set(tmp_path)
    with (tmp_path / "images" / "1.png").open("r+b") as file:
        file.truncate(65 * 2**20)
    dataset = open_evaluation_set(tmp_path)
    with pytest.raises(UserError, match="over the limit"):
        dataset.samples[0].image.read()


def test_two_sets_of_one_name_are_told_apart_by_nobody(tmp_path: Path) -> None:
    paths = [tmp_path / "old" / "animals", tmp_path / "new" / "animals", tmp_path / "plants"]
    for path in paths:
        path.mkdir(parents=True)
    check_names(paths[1:])
    with pytest.raises(UserError, match=r"two evaluation sets are called animals: .*old/animals and .*new/animals"):
        check_names(paths)
    with pytest.raises(UserError, match="called plants"):
        check_names([paths[2], tmp_path / "old" / ".." / "plants"])
    (tmp_path / "link").symlink_to(paths[0])
    with pytest.raises(UserError, match="called animals"):
        check_names([paths[1], tmp_path / "link"])
