"""Killed at every point where a command touches a file, a directory is mended by the next command."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from make_images import write_tar
from make_shards import assert_consistent, contents, killed_at, make_shards, manifest, sample, snapshot
from shard_reading import loader_index

from data_prep.editions import write_edition
from data_prep.forget import forget
from data_prep.near.dedup import dedup
from data_prep.shards.merge import merge
from data_prep.shards.publish import changing, reading
from data_prep.shards.reshard import Layout, reshard
from data_prep.shards.verify import verify, verify_slice
from formats.errors import UserError
from formats.errors import UserError as PipelineError
from formats.manifest import read_manifest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def damaged(directory: Path) -> Path:
    """Shards with a bad sample, a truncation, and nothing usable."""
    make_shards(directory, [3, 3], check=False)
    write_tar(directory / "00002.tar", [*sample(6), ("bad.jpg", b""), ("bad.txt", b"x")])
    write_tar(directory / "00003.tar", [("bad.jpg", b""), ("bad.txt", b"x")])
    path = directory / "00001.tar"
    path.write_bytes(path.read_bytes()[:-11_000])
    return directory


def repaired(directory: Path, extra: Path) -> None:
    verify(directory, 1, max_bad_ratio=1.0, repair=True)


def forgotten(directory: Path, extra: Path) -> None:
    list_file = extra / "hosts.txt"
    list_file.write_text("host1.example.org\n")
    forget(directory, list_file, "host", 1)


def deduplicated(directory: Path, extra: Path) -> None:
    dedup(
        directory,
        [],
        extra / "report",
        max_distance=4,
        remove=True,
        max_removed=1,
        pictures=2,
        processes=1,
        memory_bytes=1_000_000,
    )


def with_duplicates(directory: Path) -> Path:
    make_shards(directory, [3, 2], check=False)
    twice = sample(0)[0][1]
    write_tar(directory / "00002.tar", [*sample(7, image=twice), *sample(8)])
    verify(directory, 1, max_bad_ratio=0.0)
    return directory


@pytest.mark.parametrize(
    ("make", "command"),
    [
        (damaged, repaired),
        (lambda directory: make_shards(directory, [3, 1, 2]), forgotten),
        (with_duplicates, deduplicated),
    ],
)
def test_killed_anywhere_and_started_again_it_ends_as_if_undisturbed(
    tmp_path: Path,
    make: Callable[[Path], Path],
    command: Callable[[Path, Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data_prep.shards.rewrite.BATCH_BYTES", 1)  # publish after every shard
    monkeypatch.setattr(os, "fsync", lambda _: None)  # slow, and of use against power cuts alone
    original = make(tmp_path / "original")
    undisturbed = tmp_path / "undisturbed" / "shards"
    shutil.copytree(original, undisturbed)
    command(undisturbed, tmp_path)
    expected = snapshot(undisturbed)
    assert contents(undisturbed) != contents(original)
    kills = 0
    while True:
        directory = tmp_path / str(kills) / "shards"
        shutil.copytree(original, directory)
        (tmp_path / str(kills) / "extra").mkdir()
        work = lambda: command(directory, tmp_path / str(kills) / "extra")  # noqa: B023, E731
        was_killed = killed_at(kills, work)
        if was_killed:
            _the_loader_refuses_or_reads_all(directory)
            work()
        found = snapshot(directory)
        assert found.keys() == expected.keys(), kills
        # how many steps it took is written down; what came out is the same
        assert {n: h for n, h in found.items() if n not in ("provenance.jsonl", "dataset.json")} == {
            n: h for n, h in expected.items() if n not in ("provenance.jsonl", "dataset.json")
        }, kills
        assert_consistent(directory)
        shutil.rmtree(tmp_path / str(kills))
        kills += 1
        if not was_killed:
            break
    assert kills > 20


def _the_loader_refuses_or_reads_all(directory: Path) -> None:
    """Never is a shard half there, and never does the loader read what the manifest does not describe."""
    try:
        for shard in read_manifest(str(directory)).shards:
            assert len(loader_index(shard).keys) == shard.samples
    except PipelineError:
        pass


@pytest.mark.parametrize("command", ["reshard", "edition", "merge"])
def test_a_killed_assembly_goes_on(tmp_path: Path, command: str) -> None:
    source = make_shards(tmp_path / "source", [3, 4, 2])

    def work(output: Path) -> None:
        if command == "merge":
            merge([source, source], output, 1)
        elif command == "edition":
            write_edition(source, output, 32, 90, 1)
        else:
            reshard([source], output, Layout(samples_per_shard=2, seed=1, memory_bytes=10_000))

    work(tmp_path / "undisturbed")
    expected = snapshot(tmp_path / "undisturbed")
    kills = 0
    while killed_at(kills, lambda: work(tmp_path / str(kills))):  # noqa: B023
        output = tmp_path / str(kills)
        if not (output / "manifest.jsonl").exists():  # or else it was killed after its last act
            assert not output.exists()
            work(output)
        assert snapshot(output) == expected, kills
        assert not output.with_name(f"{kills}.partial").exists()
        kills += 1
    assert kills > 20


def test_a_killed_verify_decodes_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_shards(tmp_path / "shards", [2, 2, 2, 2], check=False)
    undisturbed = shutil.copytree(directory, tmp_path / "undisturbed")
    verify(undisturbed, 1, max_bad_ratio=0.0)
    kills = 0
    while killed_at(kills, lambda: verify(directory, 1, max_bad_ratio=0.0)):
        kills += 1
    # each kill leaves the notes of those before it, so the work is done after few of them
    assert snapshot(directory) == snapshot(undisturbed)

    (directory / "manifest.jsonl").unlink()
    verify_slice(directory, (0, 1), 1)
    monkeypatch.setattr("data_prep.shards.verify.inspect_shard", lambda path: pytest.fail(f"{path} was decoded twice"))
    assert verify(directory, 1, max_bad_ratio=0.0)
    assert manifest(directory) == manifest(undisturbed)


def test_two_commands_do_not_change_a_directory_at_once(tmp_path: Path) -> None:
    directory = make_shards(tmp_path / "shards", [1])
    with changing(directory), pytest.raises(UserError, match="another data-prep command"):
        verify(directory, 1, max_bad_ratio=0.0)
    with reading(directory), reading(directory), pytest.raises(UserError, match="another data-prep command"):
        verify(directory, 1, max_bad_ratio=0.0)
    assert verify(directory, 1, max_bad_ratio=0.0)


def test_real_commands_with_workers_killed_at_random_times(tmp_path: Path) -> None:
    directory = damaged(tmp_path / "shards")
    for shard in range(4, 10):
        write_tar(directory / f"{shard:05d}.tar", [*sample(10 * shard), *sample(10 * shard + 1), ("bad.txt", b"x")])
    undisturbed = shutil.copytree(directory, tmp_path / "undisturbed")
    verify(undisturbed, 1, max_bad_ratio=1.0, repair=True)
    command = [sys.executable, "-m", "data_prep", "verify", str(directory), "--repair", "--processes", "2"]
    rng = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.3, 1.5))
        process.kill()
        process.wait()
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    assert contents(directory) == contents(undisturbed)
    assert manifest(directory) == manifest(undisturbed)
    assert_consistent(directory)
    assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in undisturbed.iterdir())
