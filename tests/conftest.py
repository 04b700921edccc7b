"""Small data and runs that the tests make for themselves."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import small_slurm
from peers.client import Peer, peers_python
from PIL import Image
from slurm_cluster import Cluster
from waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
# ranks of a test share the machine with other tests: one thread each, and no search for accelerators
RANK_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

Member = tuple[str, bytes]


def jpeg_bytes(seed: int, width: int = 40, height: int = 32) -> bytes:
    """A small JPEG with a colour gradient that depends on the seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([(x * a + y * b) % 256 for a, b in rng.integers(1, 6, (3, 2))], -1).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[Member]) -> None:
    """An uncompressed tar of (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def write_shards(directory: Path, sizes: Sequence[int], replace: dict[str, bytes] | None = None) -> Path:
    """Shards of pairs with a manifest; `replace` puts other content under a member's name, e.g. "00000001.jpg"."""
    directory.mkdir(parents=True, exist_ok=True)
    lines, number = [], 0
    for shard, size in enumerate(sizes):
        members: list[Member] = []
        for _ in range(size):
            key = f"{number:08d}"
            members.append((f"{key}.jpg", jpeg_bytes(number)))
            members.append(
                (f"{key}.txt", f"picture number {number} of a {['cat', 'dog', 'bird'][number % 3]}".encode())
            )
            members.append((f"{key}.json", json.dumps({"key": key}).encode()))
            number += 1
        members = [(name, (replace or {}).get(name, content)) for name, content in members]
        path = directory / f"{shard:05d}.tar"
        write_tar(path, members)
        content = path.read_bytes()
        line = {"shard": path.name, "samples": size, "bytes": len(content)}
        lines.append(json.dumps(line | {"sha256": hashlib.sha256(content).hexdigest()}))
    (directory / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def train_tokenizer(path: Path) -> Path:
    """A tiny SentencePiece model with the token ids that data-prep uses."""
    import sentencepiece

    captions = [f"picture number {n} of a {animal}" for n in range(60) for animal in ("cat", "dog", "bird")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """What starts whole programs takes longer than one waits for after every save: `make check` leaves it out."""
    for item in items:
        if {"integration", "distributed", "slurm"} & set(item.path.parent.relative_to(ROOT).parts):
            item.add_marker("slow")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests whose tensors are so small that threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 pairs in three uneven shards."""
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [40, 31, 25])


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model."""
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def unused_port() -> int:
    """Below those that Slurm's jobs and the system use at any moment, so that it is still free when it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A function that gives a TCP port nobody listens on."""

    return unused_port


@pytest.fixture(scope="session")
def launch(free_port: Callable[[], int]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script of the project as a user would: `ranks=0` is plain python, else the deepspeed launcher."""

    def run(
        script: str | Path, *arguments: str, ranks: int = 0, timeout_s: float = PATIENCE_S
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script)]
        if ranks:
            launcher = Path(sys.executable).with_name("deepspeed")
            options = ["-q", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
            command = [str(launcher), *options, str(script)]
        # the launcher looks for `python` and `ninja` on the path
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            [*command, *arguments],
            cwd=ROOT,
            env={**os.environ, **RANK_ENVIRONMENT, "PATH": path},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    return run


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose sockets have short names: in pytest's own, of several processes, Slurm's exceed 108 bytes."""
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A private Slurm of two nodes; it ends with the tests, however they end."""
    missing = small_slurm.missing_programs()
    if missing:
        pytest.skip(f"no {', '.join(missing)}: install Debian's slurm-wlm and munge (.ci/run does)")
    with tempfile.TemporaryDirectory(prefix="slurm", ignore_cleanup_errors=True) as directory:  # short, for sockets
        command = [sys.executable, small_slurm.__file__, directory]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as guardian:
            assert guardian.stdout is not None
            assert guardian.stdout.readline() == "ready\n"
            environment = RANK_ENVIRONMENT | {"VENV": str(Path(sys.executable).parents[1])}
            yield Cluster(Path(directory), ROOT, environment)
            guardian.communicate()


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    """The environment of other libraries (`make peers`), in one process for all tests of a module."""
    python = peers_python()
    if python is None:
        pytest.skip("no environment with open_clip, transformers, CLIP_benchmark: run `make peers` or set PEERS_PYTHON")
    process = Peer(python)
    yield process
    process.close()


@pytest.fixture(scope="session")
def tiny_options(shards: Path, tokenizer_file: Path) -> list[str]:
    """Recipe options of a run of seconds: add train.output and what is tested."""
    return [
        "--recipe",
        "demo",
        "model.name=ViT-test-8",
        f"data.train={shards}",
        f"data.tokenizer={tokenizer_file}",
        "data.workers=0",
        "train.global_batch_size=16",
        "train.micro_batch_size=8",
        "train.log_every_steps=1",
        "optimizer.warmup_steps=2",
    ]
