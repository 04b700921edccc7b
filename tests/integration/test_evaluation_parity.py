"""The same exported model on the same shards: CLIP_benchmark's numbers are ours, and its table builder reads our files.

Needs the environment of `make peers`, or another one named by PEERS_PYTHON.
"""

from __future__ import annotations

import csv
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes
from peers.cases import small_config, untrained_model
from peers.client import Peer

from pipeline import evaluate
from pipeline.data.captions import Tokenizer, load_tokenizer
from pipeline.export import FORMATS, export, random_examples

pytestmark = pytest.mark.slow

# no two alike, as no two captions below: of exact ties CLIP_benchmark takes the first, we take the mean over all orders
CLASSES = ["crane", "heron", "red fox", "Zürich café", "owl", "ship", "bridge"]
COLOURS = ["red", "blue", "green", "old", "wet"]
TEMPLATES = ["a photo of a {c}.", "the {c}", "art of {c}, small"]


def write_set(directory: Path, shards: list[list[tuple[str, bytes]]], texts: dict[str, str]) -> Path:
    (directory / "test").mkdir(parents=True)
    for number, members in enumerate(shards):
        with tarfile.open(directory / "test" / f"{number}.tar", "w") as tar:
            for name, content in members:
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
    for name, text in (texts | {"test/nshards.txt": str(len(shards))}).items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def pictures(count: int, kind: str, text: Any) -> list[list[tuple[str, bytes]]]:
    """`count` pictures of various sizes with a text each, in three shards."""
    rng = random.Random(3)
    members = []
    for number in range(count):
        size = (rng.randint(20, 90), rng.randint(20, 90))
        members.append([(f"{number:04d}.jpg", jpeg_bytes(number, *size)), (f"{number:04d}.{kind}", text(number, rng))])
    parts = members[: count // 2], members[count // 2 : count - 3], members[count - 3 :]
    return [[member for sample in part for member in sample] for part in parts]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    words = [
        "a",
        "red",
        "blue",
        "small",
        "old",
        "dog",
        "cat",
        "tree",
        "runs",
        "sleeps",
        "beside",
        "on",
        "the",
        "wet",
        "green",
        "hill",
    ]
    labels = pictures(150, "cls", lambda number, rng: str(rng.randrange(len(CLASSES))).encode())
    names = {"classnames.txt": "\n".join(CLASSES), "zeroshot_classification_templates.txt": "\n".join(TEMPLATES)}

    def captions(number: int, rng: random.Random) -> bytes:
        lines = [f"{' '.join(rng.choices(words, k=rng.randint(2, 12)))} {number} {line}" for line in range(5)]
        return "\n".join(lines).encode()

    def several(number: int, rng: random.Random) -> bytes:
        stream = io.BytesIO()
        np.save(stream, np.array([rng.random() < 0.3 for _ in CLASSES]))
        return stream.getvalue()

    many = pictures(120, "npy", several)
    scenes = pictures(90, "txt", captions)
    return {
        "zeroshot_classification": write_set(folder / "birds", labels, names),
        "multi_label": write_set(folder / "several", many, names | {"dataset_type.txt": "multilabel"}),
        "zeroshot_retrieval": write_set(folder / "scenes", scenes, {"dataset_type.txt": "retrieval"}),
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, peer: Peer) -> Path:
    config, merges = small_config(), load_tokenizer(peer("merges"), 77)
    tokenizer = Tokenizer(merges.encoder, merges.source, config.text.context_length)
    model = untrained_model(config, tokenizer)
    with torch.no_grad():
        for parameter in model.clip.parameters():  # far enough from its beginning to tell inputs apart
            parameter += 0.3 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("exports") / "small"
    export(model, FORMATS["open_clip"], folder, random_examples(model))
    return folder


def test_multi_label_figures_are_clip_benchmarks(
    exported: Path, sets: dict[str, Path], peer: Peer, tmp_path: Path
) -> None:
    options = ["--output", str(tmp_path / "ours"), "--tokenizer", peer("merges")]
    assert evaluate.main(["--checkpoint", str(exported), "--data", str(sets["multi_label"]), *options]) == 0
    result = json.loads((tmp_path / "ours" / "results.jsonl").read_text())
    peer("clip_benchmark", exported, sets["multi_label"], "zeroshot_classification", tmp_path / "theirs.json")
    assert result["metrics"] == pytest.approx(json.loads((tmp_path / "theirs.json").read_text())["metrics"], abs=1e-6)
    low, high = result["intervals"]["mean_average_precision"]
    assert low < result["metrics"]["mean_average_precision"] < high


def test_composition_figures_are_clip_benchmarks(exported: Path, peer: Peer, tmp_path: Path) -> None:
    """SugarCrepe's files as they are, on pictures of our own; CLIP_benchmark looks for the images in val2017/."""
    (tmp_path / "crepe" / "images").mkdir(parents=True)
    (tmp_path / "crepe" / "val2017").symlink_to("images")
    categories = {"swap_att": 40, "replace_rel": 30}
    for category, count in categories.items():
        entries = {}
        for number in range(count):
            name = f"{category}_{number:012d}.jpg"
            (tmp_path / "crepe" / "images" / name).write_bytes(jpeg_bytes(number, 40 + number, 60))
            caption = f"a {COLOURS[number % 5]} dog beside {number} small cats"
            negative = f"a small dog beside {number} {COLOURS[number % 5]} cats"
            entries[str(2 * number)] = {"filename": name, "caption": caption, "negative_caption": negative}
        (tmp_path / "crepe" / f"{category}.json").write_text(json.dumps(entries))
    options = ["--output", str(tmp_path / "ours"), "--tokenizer", peer("merges")]
    assert evaluate.main(["--checkpoint", str(exported), "--data", str(tmp_path / "crepe"), *options]) == 0
    metrics = json.loads((tmp_path / "ours" / "results.jsonl").read_text())["metrics"]
    for category in categories:
        task = ("image_caption_selection", tmp_path / f"{category}.json", f"sugar_crepe/{category}")
        peer("clip_benchmark", exported, tmp_path / "crepe", *task)
        theirs = json.loads((tmp_path / f"{category}.json").read_text())["metrics"]["acc"]
        assert 0 < theirs < 1
        assert metrics[f"acc/{category}"] == pytest.approx(theirs, abs=1e-6)


def test_metrics_are_clip_benchmarks(exported: Path, sets: dict[str, Path], peer: Peer, tmp_path: Path) -> None:
    sets = {task: directory for task, directory in sets.items() if task != "multi_label"}
    data = [str(directory) for directory in sets.values()]
    ours = tmp_path / "ours"
    options = ["--output", str(ours), "--tokenizer", peer("merges")]
    assert evaluate.main(["--checkpoint", str(exported), "--data", *data, *options]) == 0
    results = {line["task"]: line for line in map(json.loads, (ours / "results.jsonl").read_text().splitlines())}
    for task, directory in sets.items():
        theirs_file = tmp_path / f"{task}.json"
        peer("clip_benchmark", exported, directory, task, theirs_file)
        theirs = json.loads(theirs_file.read_text())["metrics"]
        metrics = results[task]["metrics"]
        assert metrics.keys() == theirs.keys()
        for name, value in theirs.items():
            assert metrics[name] == pytest.approx(value, abs=1e-6), (task, name)
            assert 0 < value < 1, f"{name} says nothing"

    # and its own table builder reads our files, theirs beside them
    (tmp_path / "zeroshot_retrieval.json").rename(ours / "clip_benchmark" / "theirs.json")
    peer("clip_benchmark_table", ours / "clip_benchmark", tmp_path / "table.csv")
    rows = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert {row["dataset"] for row in rows} == {"birds", "scenes", "wds/set"}
    recalls = [row["image_retrieval_recall@5"] for row in rows if row["image_retrieval_recall@5"]]
    assert len(recalls) == 2
    assert float(recalls[0]) == pytest.approx(float(recalls[1]), abs=1e-6)
