"""Hostile shards and hostile machines, at the command line."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from make_images import good_sample, png_bomb, write_tar
from make_shards import assert_consistent, contents, make_shards, manifest, snapshot

from data_prep.__main__ import main
from data_prep.shards.verify import verify


class Bomb:
    """Unpickling it would leave a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


def test_a_hostile_shard_is_repaired_to_its_good_samples(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    pickled = pickle.dumps(Bomb(outside))
    directory = tmp_path / "shards"
    path = write_tar(
        directory / "00000.tar",
        [
            *good_sample("good", 1),
            ("good.pkl", pickled),
            ("good.pyd", pickled),
            link("linked.jpg", "/etc/passwd", tarfile.SYMTYPE),
            link("linked.txt", "good.txt", tarfile.LNKTYPE),
            *good_sample("../escaped", 2),
            *good_sample("/etc/absolute", 3),
            ("bomb.png", png_bomb(19_000, 19_000)),
            ("bomb.txt", b"x"),
            *good_sample("twice", 4),
            *good_sample("also good", 5),
            *good_sample("twice", 6),
        ],
    )
    content = path.read_bytes()
    end = content.rstrip(b"\0")
    cut = len(end) // 512 * 512 + 512
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 10 << 30
    path.write_bytes(content[:cut] + huge.tobuf(tarfile.GNU_FORMAT) + b"short")
    assert main(["verify", str(directory), "--processes", "1", "--repair", "--max-bad-ratio", "1"]) == 0
    assert [members["jpg"] for members in contents(directory)["00000.tar"]] == [
        dict(good_sample(key, seed))[f"{key}.jpg"] for key, seed in (("good", 1), ("also good", 5))
    ]
    with tarfile.open(path) as tar:
        assert {member.name.partition(".")[0] for member in tar} == {"good", "also good"}
    assert_consistent(directory)
    assert len(list((directory / "quarantine").iterdir())) == 1  # it was cut off, so the original is kept
    assert not outside.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["shards"]


def run_with_little_room(arguments: list[str], bytes_per_file: int) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, bytes_per_file))

    return subprocess.run(
        [sys.executable, "-m", "data_prep", *arguments],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )


@pytest.fixture
def hosts(tmp_path: Path) -> str:
    (tmp_path / "hosts.txt").write_text("host1.example.org\n")
    return str(tmp_path / "hosts.txt")


@pytest.mark.parametrize("command", ["forget", "repair", "reshard", "merge"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path: Path, hosts: str, command: str) -> None:
    directory = make_shards(tmp_path / "shards", [20, 20], check=False)
    write_tar(directory / "00002.tar", [*(m for i in range(30) for m in good_sample(f"{i}", i)), ("bad.jpg", b"")])
    verify(directory, 1, max_bad_ratio=1.0)
    shutil.copytree(directory, tmp_path / "copy")
    before = snapshot(directory)
    arguments = {
        "forget": ["forget", str(directory), "--host", hosts, "--processes", "1"],
        "repair": ["verify", str(directory), "--repair", "--processes", "1"],
        "reshard": ["reshard", str(directory), "--output", str(tmp_path / "out"), "--samples-per-shard", "100"],
        "merge": ["merge", str(directory), "--output", str(tmp_path / "out"), "--processes", "1"],
    }[command]
    process = run_with_little_room(arguments, bytes_per_file=20_000)
    assert process.returncode == 2, process.stderr
    assert process.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in process.stderr
    assert snapshot(directory) == before
    assert not (tmp_path / "out").exists()
    # with room again, the same command does its work
    assert main(arguments) == 0
    assert_consistent(directory)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", path], check=False, stderr=-3).returncode:
        pytest.skip("may not mount a file system")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_fills_up(small_disk: Path, hosts: str) -> None:
    directory = make_shards(small_disk / "shards", [40, 40])
    before = snapshot(directory)
    arguments = ["forget", str(directory), "--host", hosts, "--processes", "1"]
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000))
    assert main(arguments) == 2
    assert snapshot(directory) == before
    filler.unlink()
    assert main(arguments) == 0
    assert_consistent(directory)


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root may write anywhere")
def test_a_directory_without_write_permission(tmp_path: Path, hosts: str) -> None:
    directory = make_shards(tmp_path / "shards", [3])
    before = snapshot(directory)
    for path in [tmp_path, *tmp_path.parents][:4]:
        path.chmod(path.stat().st_mode | 0o055)
    directory.chmod(0o555)
    command = [sys.executable, "-m", "data_prep", "forget", str(directory), "--host", hosts, "--processes", "1"]
    if os.geteuid() == 0:
        nobody = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
        if subprocess.run([*nobody, sys.executable, "-c", "import simplejpeg"], check=False, stderr=-3).returncode:
            pytest.skip("other users may not run this environment")
        command = [*nobody, *command]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "no permission" in process.stderr.splitlines()[-1]
    assert snapshot(directory) == before
    directory.chmod(0o755)
    assert manifest(directory)[0]["samples"] == 3
