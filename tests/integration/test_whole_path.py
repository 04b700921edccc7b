"""From drawn pictures on a web server to a report, and from real photographs to a table, through the command lines."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.__main__ import main as data_prep

REPOSITORY_DATA = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("CLUSTER_CLIP_DATA", REPOSITORY_DATA))
needs_data = pytest.mark.skipif(
    not (DATA / "flickr8k_train.parquet").exists(),
    reason="set CLUSTER_CLIP_DATA to a folder with Flickr8k and CIFAR-10 parquet files",
)

pytestmark = pytest.mark.slow


def prepare(*arguments: str | Path) -> None:
    assert data_prep([str(argument) for argument in arguments]) == 0


def figures(results: Path) -> dict[str, dict[str, float]]:
    """dataset -> metric -> value over chance."""
    lines = [json.loads(line) for line in (results / "results.jsonl").read_text().splitlines()]
    return {
        line["dataset"]: {name: value / line["chance"][name] for name, value in line["metrics"].items()}
        for line in lines
    }


@pytest.fixture
def file_server(tmp_path: Path) -> Iterator[str]:
    """URL of a server for the files under tmp_path/web."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path / "web"))
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 1024  # a downloader opens many connections at once


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def test_from_a_web_server_to_a_report(tmp_path: Path, file_server: str, launch: Callable) -> None:
    web, shards, run = tmp_path / "web", tmp_path / "shards", tmp_path / "run"
    prepare("synthetic", web, "--train", "600", "--validation", "60", "--size", "32", "--base-url", file_server)
    prepare("ingest", web / "train.tsv", "--output", tmp_path / "urls.parquet")
    download = ["--resize-mode", "no", "--samples-per-shard", "200", "--processes", "2", "--allow-local"]
    prepare("download", tmp_path / "urls.parquet", "--output", shards, *download)
    prepare("verify", shards)
    assert json.loads((shards / "dataset.json").read_text())["samples"] == 600
    prepare("tokenizer", shards, "--output", tmp_path / "t.model", "--model-type", "bpe", "--vocab-size", "800")

    options = [f"data.train={shards}", f"data.tokenizer={tmp_path / 't.model'}", f"train.output={run}"]
    size = ["model.name=ViT-test-8", "train.global_batch_size=50", "train.micro_batch_size=25", "train.epochs=2"]
    trained = launch("pipeline/train.py", "--recipe", "demo", *options, *size, "data.workers=0", ranks=2)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "24/24" in trained.stdout

    sets = [str(web / "eval" / name) for name in ("zeroshot", "zeroshot_heldout", "retrieval", "composition")]
    results = run / "evaluation"
    evaluated = launch(
        "pipeline/evaluate.py", "--checkpoint", str(run), "--data", *sets, "--output", str(results), ranks=2
    )
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    assert set(figures(results)) == {"zeroshot", "zeroshot_heldout", "retrieval", "composition"}
    alone = ["--checkpoint", str(run), "--data", *sets[2:], "--output", str(tmp_path / "one_rank")]
    assert launch("pipeline/evaluate.py", *alone).returncode == 0
    for dataset, values in figures(tmp_path / "one_rank").items():
        assert figures(results)[dataset] == values, "figures depend on the number of ranks"

    report = launch("pipeline/report.py", str(run), "--images", sets[2], "--output", str(tmp_path / "report"))
    assert report.returncode == 0, report.stderr[-3000:]
    assert report.stdout.splitlines()[-1].endswith("report.html")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "zeroshot_heldout" in page
    assert page.count("data:image/") >= 3


def first_rows(source: Path, target: Path, rows: int) -> Path:
    pq.write_table(pq.read_table(source).slice(0, rows), target)
    return target


def train_and_evaluate(folder: Path, launch: Callable, dataset: str, image_size: int) -> dict[str, float]:
    """150 steps on folder/shards, then figures over chance on folder/DATASET."""
    options = [f"data.train={folder / 'shards'}", f"data.tokenizer={folder / 't.model'}", "data.workers=0"]
    options += [f"model.image_size={image_size}", "train.max_steps=150", "train.global_batch_size=64"]
    trained = launch("pipeline/train.py", "--recipe", "demo", *options, f"train.output={folder / 'run'}")
    assert trained.returncode == 0, trained.stderr[-3000:]
    arguments = ["--checkpoint", str(folder / "run"), "--data", str(folder / dataset)]
    evaluated = launch("pipeline/evaluate.py", *arguments, "--output", str(folder / "results"))
    assert evaluated.returncode == 0, evaluated.stderr[-3000:]
    return figures(folder / "results")[dataset]


@needs_data
def test_photographs_are_learned(tmp_path: Path, launch: Callable) -> None:
    """Seconds of training on Flickr8k: captions and pictures of the training set find each other above chance."""
    table = first_rows(DATA / "flickr8k_train.parquet", tmp_path / "train.parquet", 400)
    prepare("pack", table, "--captions", "each", "--output", tmp_path / "shards")
    prepare("verify", tmp_path / "shards")
    prepare("tokenizer", tmp_path / "shards", "--vocab-size", "1500", "--output", tmp_path / "t.model")
    prepare("pack", table, "--as", "retrieval", "--output", tmp_path / "flickr")
    over_chance = train_and_evaluate(tmp_path, launch, "flickr", image_size=64)
    assert over_chance["image_retrieval_recall@10"] > 2
    assert over_chance["text_retrieval_recall@10"] > 2


@needs_data
def test_labelled_pictures_become_pairs_and_a_zero_shot_set(tmp_path: Path, launch: Callable) -> None:
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (tmp_path / "classes.txt").write_text("\n".join(classes) + "\n")
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\na small picture of a {c}\n")
    labels = ["--label-column", "label", "--classnames", tmp_path / "classes.txt"]
    labels += ["--templates", tmp_path / "templates.txt"]
    train = first_rows(DATA / "cifar10_train.parquet", tmp_path / "train.parquet", 4000)
    test = first_rows(DATA / "cifar10_test.parquet", tmp_path / "test.parquet", 500)
    prepare("pack", train, *labels, "--output", tmp_path / "shards")
    prepare("verify", tmp_path / "shards")
    prepare("pack", test, *labels, "--as", "classification", "--output", tmp_path / "some_of_cifar10")
    tokenizer = ["--model-type", "bpe", "--vocab-size", "400", "--output", tmp_path / "t.model"]
    prepare("tokenizer", tmp_path / "shards", *tokenizer)
    assert train_and_evaluate(tmp_path, launch, "some_of_cifar10", image_size=32)["acc1"] > 1.5
