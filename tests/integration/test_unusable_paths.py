"""What a user who is not root cannot read or write is one line and exit code 2, from every program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import train_tokenizer, write_shards
from plain_user import outcome

from data_prep.__main__ import main as data_prep
from pipeline import bench_data, evaluate, export, mask_preview, plan, report, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that are closed to everybody, and one text in Latin-1."""
    folder = tmp_path_factory.mktemp("closed")
    write_shards(folder / "shards", [12])
    train_tokenizer(folder / "tok.model")
    for closed in ("closed/tok.model", "closed/list.csv", "closed_shards/manifest.jsonl", "closed_set/classnames.txt"):
        path = folder / closed
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
        path.chmod(0)
    (folder / "latin.yaml").write_bytes(b"base: tiny_cpu\n# caf\xe9\n")
    (folder / "closed.yaml").touch(mode=0)
    (folder / "list.csv").write_text("url,caption\nhttps://example.org/a.jpg,a\n")
    (folder / "file").write_text("a file")
    (folder / "read_only").mkdir(mode=0o555)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    return folder


SMALL = [
    *("--recipe", "tiny_cpu", "data.train={}/shards", "data.tokenizer={}/tok.model", "train.output={}/run"),
    *("model.name=ViT-test-8", "train.global_batch_size=8", "train.micro_batch_size=8", "train.max_steps=2"),
    "optimizer.warmup_steps=1",
]


@pytest.mark.parametrize(
    ("main", "arguments", "named"),
    [
        (train.main, ["--recipe", "{}/latin.yaml"], "latin.yaml"),
        (train.main, ["--recipe", "{}/closed.yaml"], "closed.yaml"),
        (train.main, [*SMALL, "train.output={}/read_only/run"], "read_only/run"),
        (train.main, [*SMALL, "train.output={}/file"], "file"),
        (train.main, [*SMALL, "train.output={}/file/run"], "file/run"),
        (
            train.main,
            [*SMALL, "data.tokenizer={}/closed/tok.model"],
            "tok.model: no permission",
        ),
        (train.main, [*SMALL, "data.train={}/closed_shards"], "closed_shards"),
        (train.main, [*SMALL, "--deepspeed_config", "{}/closed.yaml"], "closed.yaml"),
        (evaluate.main, ["--sweep", "{}/latin.yaml"], "latin.yaml"),
        (evaluate.main, ["--sweep", "{}/closed.yaml"], "closed.yaml"),
        (evaluate.main, ["--checkpoint", "x", "--data", "{}/closed_set", "--output", "{}/out"], "closed_set"),
        (report.main, ["{}", "--output", "{}/read_only/report"], "read_only"),
        (report.main, ["{}/closed.yaml", "--output", "{}/out"], "closed.yaml"),
        (plan.main, ["--recipe", "{}/closed.yaml", "--gpus", "1", "--gpu", "h100", "--samples", "9"], "closed.yaml"),
        (export.main, ["{}/closed_shards", "--format", "open_clip", "--output", "{}/out"], "closed_shards"),
        (mask_preview.main, ["{}/shards", "--output", "{}/read_only/preview.html"], "read_only"),
        (bench_data.main, [*SMALL, "data.tokenizer={}/closed/tok.model"], "tok.model: no permission"),
        (data_prep, ["build", "{}/latin.yaml"], "latin.yaml"),
        (data_prep, ["build", "{}/closed.yaml"], "closed.yaml"),
        (data_prep, ["verify", "{}/closed_shards"], "closed_shards"),
        (data_prep, ["ingest", "{}/closed/list.csv", "--output", "{}/out"], "list.csv"),
        (data_prep, ["ingest", "{}/list.csv", "--output", "{}/read_only/list"], "read_only"),
    ],
)
def test_one_line_names_it(
    main: Callable[[Sequence[str]], int], arguments: list[str], named: str, folder: Path, tmp_path: Path
) -> None:
    code, said = outcome(main, [word.format(folder) for word in arguments], tmp_path / "log")
    errors = [line for line in said.splitlines() if line.startswith("error")]
    print(said)
    assert (code, len(errors), "Traceback" in said) == (2, 1, False)
    assert named in errors[0]
