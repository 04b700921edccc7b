from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_images import encoded, good_sample, png_bomb, write_tar
from shard_reading import loader_index

from data_prep.__main__ import main
from data_prep.shards.verify import inspect_shard, verify
from formats.errors import UserError
from formats.manifest import read_manifest
from formats.tar import TarSamples

VERDICT = "data_prep.shards.verify.inspect_shard"


def manifest(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "manifest.jsonl").read_text().splitlines()]


def dataset(directory: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((directory / "dataset.json").read_text())
    return value


@pytest.mark.parametrize("processes", [1, 2])
def test_manifest_of_sound_shards(tmp_path: Path, processes: int) -> None:
    for shard in range(3):
        write_tar(
            tmp_path / f"{shard:05d}.tar",
            [member for index in range(shard + 1) for member in good_sample(f"{shard}{index}", index)],
        )
    assert verify(tmp_path, processes, max_bad_ratio=0.0)
    for shard, line in enumerate(manifest(tmp_path)):
        content = (tmp_path / f"{shard:05d}.tar").read_bytes()
        assert line == {
            "shard": f"{shard:05d}.tar",
            "samples": shard + 1,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "rules": 2,
        }
    summary = dataset(tmp_path)
    assert (summary["format_version"], summary["samples"], summary["shards"]) == (1, 6, 3)
    assert summary["bytes"] == sum(line["bytes"] for line in manifest(tmp_path))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("bad.jpg", encoded()[:-200]), ("bad.txt", b"x")], "image_does_not_decode"),
        ([("bad.png", png_bomb(19_000, 19_000)), ("bad.txt", b"x")], "image_too_large"),
        ([("bad.jpg", b""), ("bad.txt", b"x")], "image_does_not_decode"),
        ([("bad.jpg", encoded())], "no_caption"),
        ([("bad.jpg", encoded()), ("bad.txt", b" \n")], "empty_caption"),
        ([("bad.jpg", encoded()), ("bad.txt", b"caf\xe9")], "caption_not_utf8"),
        ([("bad.txt", b"x"), ("bad.json", b"{}")], "no_image"),
        ([("bad.jpg", encoded()), ("bad.png", encoded(kind="PNG")), ("bad.txt", b"x")], "duplicate_member"),
        ([("bad.jpg", encoded()), ("bad.txt", b"x"), ("bad.txt", b"y")], "duplicate_member"),
        ([("../bad.jpg", encoded()), ("../bad.txt", b"x")], "unsafe_name"),
        ([("/etc/bad.jpg", encoded()), ("/etc/bad.txt", b"x")], "unsafe_name"),
    ],
)
def test_each_fault_is_named_and_its_key_skipped(
    tmp_path: Path, members: list[tuple[str, bytes]], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "00000.tar", [*good_sample("a"), *members, *good_sample("z")])
    assert not verify(tmp_path, 1, max_bad_ratio=0.1)
    assert dataset(tmp_path)["skipped"] == {reason: 1}
    (line,) = manifest(tmp_path)
    assert line["samples"] == 2
    assert line["skip"] == [members[0][0].rsplit(".", 1)[0]]
    assert reason in capsys.readouterr().out
    assert verify(tmp_path, 1, max_bad_ratio=0.4)


def test_a_key_that_returns_later_is_not_trained_on(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [*good_sample("a"), *good_sample("b"), *good_sample("a", seed=1)])
    report = inspect_shard(tmp_path / "00000.tar")
    assert (report.samples, report.skipped, report.skipped_samples) == (1, {"duplicate_key": ["a", "a"]}, 2)
    verify(tmp_path, 1, max_bad_ratio=1.0)
    assert dataset(tmp_path)["skipped"] == {"duplicate_key": 2}


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def test_unknown_members_are_counted_and_never_opened(tmp_path: Path) -> None:
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("b.jpg")
    device.type = tarfile.CHRTYPE
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    pickled = pickle.dumps(Bomb())
    members = [folder, link, *good_sample("a"), ("a.pkl", pickled), ("a.pyd", pickled), device, ("README", b"")]
    write_tar(tmp_path / "00000.tar", members)
    before = sorted(tmp_path.rglob("*"))
    assert verify(tmp_path, 1, max_bad_ratio=0.0)
    assert dataset(tmp_path)["unknown_members"] == 5
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "manifest.jsonl", tmp_path / "dataset.json"])


@pytest.mark.parametrize("kept", ["inside a header", "inside an image", "at a member's end", "nothing"])
def test_what_precedes_a_truncation_stays_usable(tmp_path: Path, kept: str) -> None:
    path = write_tar(tmp_path / "00000.tar", [m for i in range(4) for m in good_sample(f"{i}", i)])
    with tarfile.open(path) as tar:
        third = tar.getmember("2.jpg")
    length = {
        "inside a header": third.offset + 100,
        "inside an image": third.offset_data + 50,
        "at a member's end": third.offset,
        "nothing": 0,
    }[kept]
    path.write_bytes(path.read_bytes()[:length])
    assert not verify(tmp_path, 1, max_bad_ratio=1.0)
    (line,) = manifest(tmp_path)
    assert line["truncated"] is True
    assert line["samples"] == (0 if kept == "nothing" else 2)
    assert dataset(tmp_path)["truncated_shards"] == ["00000.tar"]


def test_damage_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", [*good_sample("0"), *good_sample("1")])
    with tarfile.open(path) as tar:
        offset = tar.getmember("1.jpg").offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 512] = b"\x7f" * 512
    path.write_bytes(content)
    report = inspect_shard(path)
    assert (report.truncated, report.samples) == (True, 1)


def test_an_empty_shard_is_no_error_beside_others(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", good_sample("a"))
    with (tmp_path / "00001.tar").open("wb") as stream:
        webdataset.TarWriter(stream).close()  # what img2dataset leaves when a whole shard fails
    assert verify(tmp_path, 2, max_bad_ratio=0.0)
    assert [line["samples"] for line in manifest(tmp_path)] == [1, 0]
    assert not dataset(tmp_path)["truncated_shards"]


def test_verifying_twice_gives_the_same_manifest(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [*good_sample("a"), ("b.jpg", b"no")])
    verify(tmp_path, 1, max_bad_ratio=1.0)
    first = (tmp_path / "manifest.jsonl").read_bytes()
    verify(tmp_path, 2, max_bad_ratio=1.0)
    assert (tmp_path / "manifest.jsonl").read_bytes() == first


def test_no_usable_sample_is_a_failure(tmp_path: Path) -> None:
    write_tar(tmp_path / "00000.tar", [("a.jpg", b"no"), ("a.txt", b"x")])
    assert not verify(tmp_path, 1, max_bad_ratio=1.0)


@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_without_shards_is_refused(tmp_path: Path, exists: bool) -> None:
    directory = tmp_path / "shards"
    if exists:
        directory.mkdir()
    with pytest.raises(UserError, match=r"shards"):
        verify(directory, 1, max_bad_ratio=0.0)


def test_names_that_are_not_utf8_do_not_stop_it(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00000.tar", [("aXb.jpg", b"no"), ("aXb.txt", b"x"), *good_sample("c")])
    content = path.read_bytes()
    for name in (b"aXb.jpg", b"aXb.txt"):
        content = content.replace(name, name.replace(b"X", b"\xe9"))
    with_checksums = bytearray(content)
    for offset in (content.index(b"a\xe9b.jpg"), content.index(b"a\xe9b.txt")):
        header = with_checksums[offset : offset + 512]
        header[148:156] = b" " * 8
        with_checksums[offset + 148 : offset + 156] = f"{sum(header):06o}\0 ".encode()
    path.write_bytes(with_checksums)
    verify(tmp_path, 1, max_bad_ratio=1.0)
    (line,) = manifest(tmp_path)
    assert (line["samples"], line["skip"]) == (1, ["a\\xe9b"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_raises_and_no_sample_is_invented(tmp_path: Path, data: st.DataObject) -> None:
    sound = write_tar(tmp_path / "sound.tar", [m for i in range(3) for m in good_sample(f"{i}", i)]).read_bytes()
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        damage = data.draw(st.binary(min_size=1, max_size=32))
        content[start : start + len(damage)] = damage
    path = tmp_path / "damaged.tar"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    report = inspect_shard(path)
    # at most one new key per damaged name
    assert report.samples + len(report.skip) <= 3 + 4


def test_only_what_changed_is_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", good_sample(str(shard), shard))
    assert verify(tmp_path, 1, max_bad_ratio=0.0)
    before = manifest(tmp_path)
    write_tar(tmp_path / "00001.tar", good_sample("other", 9))
    decoded: list[str] = []
    monkeypatch.setattr(
        "data_prep.shards.verify.inspect_shard", lambda path: decoded.append(path.name) or inspect_shard(path)
    )
    verify(tmp_path, 1, max_bad_ratio=0.0)
    assert decoded == ["00001.tar"]
    assert [line["sha256"] == old["sha256"] for line, old in zip(manifest(tmp_path), before, strict=True)] == [1, 0, 1]
    decoded.clear()
    verify(tmp_path, 1, max_bad_ratio=0.0, again=True)
    assert sorted(decoded) == ["00000.tar", "00001.tar", "00002.tar"]


def test_a_silent_change_is_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bit of a caption decays: every check passes, only the hash knows."""
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", good_sample(str(shard), shard))
    assert verify(tmp_path, 1, max_bad_ratio=0.0)
    path = tmp_path / "00001.tar"
    path.write_bytes(path.read_bytes().replace(b"a caption", b"a cbption"))
    (tmp_path / "00002.tar").unlink()
    assert not verify(tmp_path, 1, max_bad_ratio=0.0)
    printed = capsys.readouterr().out
    assert re.search(r"other than the manifest said +1 +00001.tar", printed)
    assert re.search(r"missing shard +1 +00002.tar", printed)
    assert verify(tmp_path, 1, max_bad_ratio=0.0)


def test_rules_of_an_older_version_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "00000.tar", good_sample("a"))
    verify(tmp_path, 1, max_bad_ratio=0.0)
    (line,) = manifest(tmp_path)
    decoded: list[Path] = []
    monkeypatch.setattr(
        "data_prep.shards.verify.inspect_shard", lambda path: decoded.append(path) or inspect_shard(path)
    )
    del line["rules"]
    for runs, rules in ((1, {"rules": 0}), (2, {})):
        (tmp_path / "manifest.jsonl").write_text(json.dumps({**line, **rules}) + "\n")
        assert verify(tmp_path, 1, max_bad_ratio=0.0)
        assert len(decoded) == runs


def test_slices_together_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "shards"
    for shard in range(7):
        write_tar(directory / f"{shard:05d}.tar", [*good_sample(str(shard), shard), ("bad.txt", b"x")])
    whole = shutil.copytree(directory, tmp_path / "whole")
    verify(whole, 1, max_bad_ratio=1.0)
    for part in ("0/3", "2/3", "1/3"):
        assert main(["verify", str(directory), "--slice", part, "--processes", "1"]) == 0
    assert not (directory / "manifest.jsonl").exists()
    with (directory / ".verify" / "slice-1-of-3.jsonl").open("a") as stream:
        stream.write('{"line": {"sha')  # killed while it wrote
    monkeypatch.setattr(VERDICT, lambda path: pytest.fail(f"{path} was decoded twice"))
    verify(directory, 1, max_bad_ratio=1.0)
    assert manifest(directory) == manifest(whole)
    assert sorted(p.name for p in directory.iterdir()) == sorted(p.name for p in whole.iterdir())


@pytest.mark.parametrize("part", ["3/3", "4/3", "1", "0/0", "-1/2", "a/b"])
def test_slices_that_are_none(part: str) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "x", "--slice", part])


def test_repair_keeps_the_usable_samples_byte_by_byte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = write_tar(tmp_path / "00000.tar", good_sample("s", 5)).read_bytes()
    write_tar(
        tmp_path / "00001.tar",
        [*good_sample("a"), ("a.pkl", b""), ("bad.jpg", b"no"), ("bad.txt", b"x"), *good_sample("ü" * 80, 1)],
    )
    write_tar(tmp_path / "00002.tar", [*good_sample("b", 2), *good_sample("c", 3)])
    path = tmp_path / "00002.tar"
    cut = path.read_bytes()[: path.read_bytes().index(b"c.txt") + 100]
    path.write_bytes(cut)
    unusable = write_tar(tmp_path / "00003.tar", [("bad.txt", b"x")]).read_bytes()
    assert verify(tmp_path, 2, max_bad_ratio=0.0, repair=True)
    kept = {name: list(TarSamples(tmp_path / name)) for name in ("00001.tar", "00002.tar")}
    assert [(s.key, s.members) for s in kept["00001.tar"]] == [
        (key, {name.rpartition(".")[2]: content for name, content in good_sample(key, seed)})
        for key, seed in (("a", 0), ("ü" * 80, 1))
    ]
    assert [s.key for s in kept["00002.tar"]] == ["b"]
    assert (tmp_path / "00000.tar").read_bytes() == sound
    assert (tmp_path / "quarantine" / "00002.tar").read_bytes() == cut
    assert (tmp_path / "quarantine" / "00003.tar").read_bytes() == unusable
    assert [line["shard"] for line in manifest(tmp_path)] == ["00000.tar", "00001.tar", "00002.tar"]
    assert all("skip" not in line and "truncated" not in line for line in manifest(tmp_path))
    assert dataset(tmp_path)["samples"] == 4
    assert "2 damaged shards are kept" in capsys.readouterr().out
    for shard in read_manifest(str(tmp_path)).shards:
        loader_index(shard)
    assert verify(tmp_path, 1, max_bad_ratio=0.0, again=True)
    assert dataset(tmp_path)["unknown_members"] == 0


def test_a_second_original_of_a_name_finds_room_in_the_quarantine(tmp_path: Path) -> None:
    for _ in range(2):
        write_tar(tmp_path / "00000.tar", good_sample("a"))
        write_tar(tmp_path / "00001.tar", [("bad.txt", b"x")])
        verify(tmp_path, 1, max_bad_ratio=1.0, repair=True)
    assert sorted(p.name for p in (tmp_path / "quarantine").iterdir()) == ["00001-2.tar", "00001.tar"]
