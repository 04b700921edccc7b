from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from make_images import good_sample, write_tar
from make_shards import assert_consistent, captions, contents, make_shards, manifest, sample
from PIL import Image, ImageOps
from shard_reading import loader_index

from data_prep.__main__ import main
from data_prep.shards.merge import merge
from data_prep.shards.reshard import Layout, reshard
from data_prep.shards.shuffle import BucketShuffle
from data_prep.shards.uid_list import read_uids
from data_prep.shards.verify import verify
from formats.errors import UserError
from formats.manifest import read_manifest
from formats.tar import TarSamples


def uid(number: int) -> str:
    return hashlib.md5(str(number).encode()).hexdigest()


@pytest.mark.parametrize("shuffle", [[], ["--shuffle", "--seed", "3", "--memory", "5K"]])
def test_every_sample_arrives_once_in_shards_of_the_size_asked_for(tmp_path: Path, shuffle: list[str]) -> None:
    source = make_shards(tmp_path / "source", [5, 1, 8])
    output = tmp_path / "output"
    assert main(["reshard", str(source), "--output", str(output), "--samples-per-shard", "4", *shuffle]) == 0
    assert [line["samples"] for line in manifest(output)] == [4, 4, 4, 2]
    assert_consistent(output)
    assert sorted(captions(output)) == sorted(captions(source))
    assert (captions(output) == captions(source)) == (not shuffle)
    assert verify(output, 1, max_bad_ratio=0.0, again=True)
    keys = [s.key for path in sorted(output.glob("*.tar")) for s in TarSamples(path)]
    assert len(set(keys)) == 14
    for members, key in zip((m for shard in contents(output).values() for m in shard), keys, strict=True):
        assert json.loads(members["json"])["key"] == key
    (step,) = [json.loads(line) for line in (output / "provenance.jsonl").read_text().splitlines()]
    assert (step["step"], step["sources"][0]["directory"]) == ("reshard", "source")
    assert sum(len(loader_index(s).keys) for s in read_manifest(str(output)).shards) == 14


def test_a_size_in_bytes(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "source", [12])
    size_bytes = manifest(source)[0]["bytes"]
    reshard([source], tmp_path / "output", Layout(bytes_per_shard=size_bytes // 3))
    shards = manifest(tmp_path / "output")
    assert len(shards) == 3
    # a shard ends with the sample that reaches the size; a tar is padded to 10 KiB
    assert all(size_bytes // 3 <= line["bytes"] < size_bytes // 3 + 16_000 for line in shards[:-1])
    assert captions(tmp_path / "output") == captions(source)


def test_unusable_samples_stay_behind(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_tar(source / "00000.tar", [*sample(0), ("bad.jpg", b""), *sample(1), ("x.pkl", b""), *sample(0)])
    verify(source, 1, max_bad_ratio=1.0)
    reshard([source], tmp_path / "output", Layout(samples_per_shard=5))
    merge([source], tmp_path / "merged", 1)
    for directory in (tmp_path / "output", tmp_path / "merged"):
        assert captions(directory) == ["picture number 1, it's a cat"]


@pytest.mark.parametrize("command", ["reshard", "merge"])
def test_metadata_that_is_no_json_is_written_as_json(tmp_path: Path, command: str) -> None:
    """NaN and infinity, which Python's json writes and no other reader takes."""
    scores = b'{"url": "http://a.example/1.jpg", "similarity": NaN, "scores": [1.5, -Infinity]}'
    write_tar(tmp_path / "source" / "00000.tar", [*good_sample("0")[:2], ("0.json", scores)])
    verify(tmp_path / "source", 1, max_bad_ratio=0.0)
    assert main([command, str(tmp_path / "source"), "--output", str(tmp_path / "output")]) == 0
    (found,) = TarSamples(tmp_path / "output" / "00000.tar")
    assert json.loads(found.members["json"], parse_constant=pytest.fail) == {
        "url": "http://a.example/1.jpg", "similarity": None, "scores": [1.5, None], "key": found.key
    }  # fmt: skip


def test_the_shuffle_is_a_function_of_the_seed(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "source", [20, 20])
    orders = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        reshard([source], tmp_path / name, Layout(samples_per_shard=40, seed=seed, memory_bytes=20_000))
        orders.append(captions(tmp_path / name))
    assert orders[0] == orders[1] != orders[2]


def test_every_order_is_equally_likely(tmp_path: Path) -> None:
    """Four samples in eleven buckets: each of the 24 orders in a 24th of the trials."""
    trials = 480
    orders = Counter[str]()
    for seed in range(trials):
        folder = tmp_path / str(seed)
        folder.mkdir()
        shuffle = BucketShuffle(folder, total_bytes=100, memory_bytes=30, seed=seed)
        for _ in shuffle.scatter([(b"a", b"b"), (b"c", b"d")], lambda pair: ({"txt": letter} for letter in pair)):
            pass
        orders["".join(members["txt"].decode() for members in shuffle.gather())] += 1
        shutil.rmtree(folder)
    assert len(orders) == 24
    expected = trials / 24
    chi_square = sum((count - expected) ** 2 / expected for count in orders.values())
    assert chi_square < 49.7  # 23 degrees of freedom, p = 0.001; the seeds are fixed, so it passes always or never


def test_the_shuffle_needs_no_more_memory_for_more_data(tmp_path: Path) -> None:
    """60 MB are shuffled in 6; the peak is compared with that of a process that only imports."""
    filler = np.random.default_rng(0).bytes(200_000)
    source = tmp_path / "source"
    for shard in range(3):
        members = [(f"{n:06d}.{kind}", data) for n in range(100) for kind, data in (("jpg", filler), ("txt", b"x"))]
        write_tar(source / f"{shard:05d}.tar", members)
    lines = [
        {"shard": path.name, "samples": 100, "bytes": path.stat().st_size, "sha256": ""}
        for path in sorted(source.glob("*.tar"))
    ]
    (source / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom data_prep.shards.reshard import Layout, reshard\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "layout = Layout(samples_per_shard=100, seed=0, memory_bytes=6_000_000)\n"
        "reshard([Path(sys.argv[1])], Path(sys.argv[2]), layout)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, source, tmp_path / "output"], capture_output=True, text=True, check=True
    )
    assert int(process.stdout.split()[-1]) < 25_000  # KB
    assert sum(line["samples"] for line in manifest(tmp_path / "output")) == 300


@pytest.mark.parametrize("kind", ["text", "npy", "npy strings"])
def test_a_subset_by_uids_as_datacomp_lists_them(tmp_path: Path, kind: str) -> None:
    source = make_shards(tmp_path / "source", [4, 4])
    wanted = [uid(n) for n in (6, 1, 2)] + ["f" * 32]
    path = tmp_path / ("uids.txt" if kind == "text" else "uids.npy")
    if kind == "text":
        path.write_text("\ufeff" + "\n".join(wanted) + "\n\n")  # as some editors save it
    elif kind == "npy":
        np.save(path, np.array([(int(u[:16], 16), int(u[16:], 16)) for u in wanted], np.dtype("u8,u8")))
    else:
        np.save(path, np.array(wanted))
    output = tmp_path / "output"
    arguments = ["reshard", str(source), "--output", str(output), "--samples-per-shard", "9", "--uids", str(path)]
    assert main(arguments) == 0
    assert captions(output) == [f"picture number {n}, it's a cat" for n in (1, 2, 6)]


def test_a_uid_listed_twice_gives_two_samples(tmp_path: Path) -> None:
    source = make_shards(tmp_path / "source", [3])
    (tmp_path / "uids").write_text(f"{uid(1)}\n{uid(1)}\n{uid(0)}\n")
    reshard([source], tmp_path / "output", Layout(samples_per_shard=9), tmp_path / "uids")
    assert captions(tmp_path / "output") == [f"picture number {n}, it's a cat" for n in (0, 1, 1)]
    assert verify(tmp_path / "output", 1, max_bad_ratio=0.0, again=True)


@given(
    st.lists(st.one_of(st.text("abc019", min_size=1, max_size=3), st.text("0f", min_size=32, max_size=32)), min_size=1)
)
def test_uids_are_counted_as_a_counter_counts_them(tmp_path_factory: pytest.TempPathFactory, uids: list[str]) -> None:
    path = tmp_path_factory.mktemp("uids") / "uids.txt"
    path.write_text("\n".join(uids))
    listed = read_uids(path)
    counts = Counter(uids)
    assert {u: listed.count(u) for u in [*uids, "", "0" * 32, "f" * 32]} == {
        u: counts[u] for u in [*uids, "", "0" * 32, "f" * 32]
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("uids.txt", b""),
        ("uids.txt", b"\n \n"),
        ("uids.txt", b"\xff\n"),
        ("uids.npy", b""),
        ("uids.npy", b"text"),
        ("uids.npy", pickle.dumps(["a" * 32])),
    ],
)
def test_files_that_are_no_uid_lists(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=r"uids"):
        read_uids(tmp_path / name)


def test_merged_shards_are_numbered_densely_and_no_key_occurs_twice(tmp_path: Path) -> None:
    first, second = make_shards(tmp_path / "first", [2, 3]), make_shards(tmp_path / "second", [2, 1])
    (second / "00001.tar").rename(second / "00007.tar")
    verify(second, 1, max_bad_ratio=0.0)
    output = tmp_path / "merged"
    assert main(["merge", str(first), str(second), "--output", str(output), "--processes", "2"]) == 0
    assert [line["shard"] for line in manifest(output)] == [f"{n:05d}.tar" for n in range(4)]
    assert captions(output) == captions(first) + captions(second)
    keys = [s.key for path in sorted(output.glob("*.tar")) for s in TarSamples(path)]
    assert len(set(keys)) == len(keys) == 8
    assert_consistent(output)


def test_merging_with_the_keys_kept_takes_the_files_as_they_are(tmp_path: Path) -> None:
    first, second = make_shards(tmp_path / "first", [2]), tmp_path / "second"
    write_tar(second / "x.tar", [*good_sample("a"), ("bad.jpg", b"")])
    verify(second, 1, max_bad_ratio=1.0)
    output = tmp_path / "merged"
    assert main(["merge", str(first), str(second), "--output", str(output), "--keep-keys"]) == 0
    assert (output / "00001.tar").read_bytes() == (second / "x.tar").read_bytes()
    assert [line.get("skip") for line in manifest(output)] == [None, ["bad"]]
    assert_consistent(output)


RESHARD = ["reshard", "{good}", "--output", "{out}", "--samples-per-shard", "1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["reshard", "{unverified}", "--output", "{out}", "--samples-per-shard", "1"], "run `data-prep verify"),
        (["merge", "{unverified}", "--output", "{out}"], "run `data-prep verify"),
        (["merge", "{changed}", "--output", "{out}"], "it changed"),
        (["reshard", "{good}", "--output", "{good}/x", "--samples-per-shard", "1"], "lie in each other"),
        (["merge", "{good}", "--output", "{unverified}"], "is not empty"),
        (
            ["reshard", "{good}", "--output", "{out}", "--samples-per-shard", "1", "--uids", "{uids}"],
            "no sample is left",
        ),
        (
            ["reshard", "{good}", "--output", "{out}", "--samples-per-shard", "1", "--uids", "{absent}"],
            "cannot be read",
        ),
        (["merge", "{absent}", "--output", "{out}"], "is not a directory"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {name: str(tmp_path / name) for name in ("unverified", "changed", "good", "uids", "absent", "out")}
    for name in ("changed", "good"):
        make_shards(tmp_path / name, [2])
    make_shards(tmp_path / "unverified", [1], check=False)
    with (tmp_path / "changed" / "00000.tar").open("ab") as stream:
        stream.write(bytes(512))
    (tmp_path / "uids").write_text("no such uid\n")
    assert main([argument.format(**paths) for argument in arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_pictures_that_readers_see_otherwise_are_written_as_all_see_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, clear = io.BytesIO(), io.BytesIO()
    Image.linear_gradient("L").resize((40, 24)).convert("RGB").save(turned, "JPEG", exif=exif, quality=95)
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(clear, "PNG")
    members = [("0.jpg", turned.getvalue()), ("0.txt", b"turned"), ("1.png", clear.getvalue()), ("1.txt", b"clear")]
    write_tar(tmp_path / "source" / "00000.tar", [*members, *good_sample("2")])
    assert main(["verify", str(tmp_path / "source")]) == 0
    assert "turned by EXIF" in capsys.readouterr().out
    assert manifest(tmp_path / "source")[0]["unusual"] == {"transparent": 1, "turned by EXIF": 1}
    for command in ("reshard", "merge"):  # the count is not lost on the way
        assert main([command, str(tmp_path / "source"), "--output", str(tmp_path / command)]) == 0
        assert manifest(tmp_path / command)[0]["unusual"] == {"transparent": 1, "turned by EXIF": 1}
    (tmp_path / "list").write_text(hashlib.sha256(clear.getvalue()).hexdigest())
    assert main(["forget", str(tmp_path / "merge"), "--sha256", str(tmp_path / "list")]) == 0
    assert manifest(tmp_path / "merge")[0]["unusual"] == {"turned by EXIF": 1}
    assert main(["reshard", str(tmp_path / "source"), "--output", str(tmp_path / "out"), "--normalise"]) == 0
    assert main(["verify", str(tmp_path / "out"), "--again"]) == 0
    assert "unusual" not in manifest(tmp_path / "out")[0]
    first, second, third = TarSamples(tmp_path / "out" / "00000.tar")
    upright = np.asarray(ImageOps.exif_transpose(Image.open(turned))).astype(float)
    assert np.abs(np.asarray(Image.open(io.BytesIO(first.members["jpg"]))) - upright).mean() < 4
    assert Image.open(io.BytesIO(second.members["png"])).convert("RGB").getcolors() == [(81, (255, 255, 255))]
    assert third.members["jpg"] == dict(good_sample("2"))["2.jpg"]
