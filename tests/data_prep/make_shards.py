"""Small shard directories for the tests, and what is in a directory."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from make_images import write_tar
from PIL import Image
from tqdm import tqdm

from data_prep.shards.verify import verify
from formats.files import sha256_of
from formats.tar import TarSamples

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree"}


def picture(seed: int, size: int = 64) -> bytes:
    """A JPEG that depends on the seed, with forms of all sizes, the larger the stronger, as photographs have them."""
    rng = np.random.default_rng(seed)
    pixels_HWC = np.full((size, size, 3), 128.0)
    for cells, contrast in ((3, 60), (6, 40), (12, 25)):
        forms = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels_HWC += (np.asarray(forms.resize((size, size), Image.Resampling.BICUBIC)) - 128.0) * contrast / 128
    stream = io.BytesIO()
    Image.fromarray(pixels_HWC.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def sample(number: int, image: bytes | None = None, key: str | None = None, **metadata: Any) -> list[tuple[str, bytes]]:
    """The members of one good sample: everything about it follows from its number."""
    key = key or f"{number:09d}"
    fields = {
        "key": key,
        "uid": hashlib.md5(str(number).encode()).hexdigest(),
        "url": f"https://host{number % 3}.example.org/{number}.jpg",
        **metadata,
    }
    caption = f"picture number {number}, it's a cat".encode()
    return [
        (f"{key}.jpg", image or picture(number)),
        (f"{key}.txt", caption),
        (f"{key}.json", json.dumps(fields).encode()),
    ]


def make_shards(directory: Path, sizes: list[int], first: int = 0, check: bool = True) -> Path:
    """A verified directory of shards of the given numbers of samples, numbered from `first`."""
    for shard, size in enumerate(sizes):
        write_tar(directory / f"{shard:05d}.tar", [member for n in range(first, first + size) for member in sample(n)])
        first += size
    if check:
        assert verify(directory, 1, max_bad_ratio=0.0)
    return directory


def contents(directory: Path) -> dict[str, list[dict[str, bytes]]]:
    """The samples of each shard, less what does not survive a new key."""
    return {path.name: [s.members for s in TarSamples(path)] for path in sorted(directory.glob("*.tar"))}


def captions(directory: Path) -> list[str]:
    """All captions in order."""
    return [members["txt"].decode() for shard in contents(directory).values() for members in shard]


def manifest(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "manifest.jsonl").read_text().splitlines()]


def snapshot(directory: Path) -> dict[str, str]:
    """Every file of a directory by its hash; times in records do not count."""
    return {
        str(path.relative_to(directory)): _hash_without_times(path)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _hash_without_times(path: Path) -> str:
    if path.suffix != ".jsonl":
        return sha256_of(path)
    lines = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in path.read_text().splitlines()]
    return json.dumps(lines)


def assert_consistent(directory: Path) -> None:
    """The manifest, the totals and the shards say the same."""
    lines = manifest(directory)
    assert [line["shard"] for line in lines] == sorted(path.name for path in directory.glob("*.tar"))
    for line in lines:
        path = directory / line["shard"]
        assert (path.stat().st_size, sha256_of(path)) == (line["bytes"], line["sha256"])
        skip = line.get("skip", [])
        assert len([s for s in TarSamples(path) if s.key not in skip]) == line["samples"]
    dataset = json.loads((directory / "dataset.json").read_text())
    assert dataset["samples"] == sum(line["samples"] for line in lines)
    assert dataset["bytes"] == sum(line["bytes"] for line in lines)


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that is killed (SIGKILL) at its `step`-th operation on files; False if it ended before."""
    tqdm.monitor_interval = 0  # no thread that may hold a lock in the moment of the fork
    child = os.fork()
    if child == 0:
        remaining = step

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal remaining
            # reading changes nothing
            if event not in FILE_EVENTS or (event == "open" and not int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
                return
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            remaining -= 1

        with contextlib.suppress(BaseException), Path(os.devnull).open("w") as silence:
            sys.stdout = sys.stderr = silence
            sys.addaudithook(count)
            work()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False
