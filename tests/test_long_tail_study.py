"""benchmarks/study/long_tail.py: how rare its classes are, what it packs, and what it makes of runs."""

from __future__ import annotations

import csv
import importlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_prep.__main__ import main as data_prep_main
from formats.balance import read_balance, write_balance
from formats.manifest import read_manifest
from pipeline.evaluation.sets.layouts import ClassificationSet, open_evaluation_set
from pipeline.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["ant", "bee", "cow", "dog", "eel", "fox"]
COUNTS = [8, 8, 5, 4, 3, 2]  # 30 pictures, as 1 / rank but never more than 8


@pytest.fixture(scope="module", autouse=True)
def study_modules() -> Iterator[None]:
    """Scripts of a folder import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        patch.syspath_prepend(str(ROOT / "benchmarks/study"))
        yield


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@given(st.integers(1, 40), st.integers(1, 60), st.floats(0.1, 2.0), st.data())
def test_classes_are_as_frequent_as_zipf_says(classes: int, most: int, exponent: float, data: st.DataObject) -> None:
    pictures = data.draw(st.integers(classes, classes * most))
    counts = module("long_tail_data").zipf_counts(classes, pictures, most, exponent)
    assert counts.sum() == pictures
    assert counts.max() <= most
    assert (np.diff(counts) <= 0).all()
    free = np.flatnonzero(counts < most)  # one scale explains all that the limit leaves alone, within a picture
    weight = (free + 1.0) ** exponent
    assert ((counts[free] - 1) * weight).max(initial=0) <= ((counts[free] + 1) * weight).min(initial=np.inf)


def pictures(path: Path, of_each_class: int) -> Path:
    rows = []
    for label in range(len(NAMES)):
        for number in range(of_each_class):
            stream = io.BytesIO()
            Image.new("RGB", (8, 8), (40 * label, 10 * number, 0)).save(stream, "PNG")
            rows.append({"image": stream.getvalue(), "label": label})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def prepared(study_modules: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long_tail")
    with (folder / "classes.tsv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["label", "lemmas", "gloss"])
        writer.writerows([label, f"{name}, {name.upper()}", f"what {name}s are"] for label, name in enumerate(NAMES))
    train, test = pictures(folder / "train.parquet", 8), pictures(folder / "test.parquet", 2)

    def in_this_process(command: str, *arguments: object) -> None:
        words = [command, *map(str, arguments)]
        if command == "tokenizer":  # too few captions for a vocabulary
            return
        assert data_prep_main(words) == 0

    data = module("long_tail_data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "data_prep", in_this_process)
        data.prepare(train, test, folder / "classes.tsv", folder / "out", sum(COUNTS), 1.0)
    return folder / "out"


def test_shards_have_the_counts_and_captions_name_the_class(prepared: Path) -> None:
    ranks, name_of_rank = np.load(prepared / "ranks.npy"), dict[int, str]()
    captions = []
    with tarfile.open(prepared / "shards" / "00000.tar") as tar:
        for member in tar:
            if member.name.endswith(".txt") and (file := tar.extractfile(member)):
                captions.append(file.read().decode())
    assert len(captions) == len(ranks) == sum(COUNTS)
    for caption, rank in zip(captions, ranks.tolist(), strict=True):
        [name] = [name for name in NAMES if name in caption.lower()]
        assert name_of_rank.setdefault(rank, name) == name
    assert sorted(Counter(ranks.tolist()).values(), reverse=True) == COUNTS
    assert len(set(name_of_rank.values())) == len(NAMES)


def test_each_third_is_a_set_of_its_classes_among_all(prepared: Path) -> None:
    labels = set[int]()
    for third in ("head", "middle", "tail"):
        dataset = open_evaluation_set(prepared / third)
        assert isinstance(dataset, ClassificationSet)
        assert dataset.class_names == tuple(NAMES)
        found = {sample.label for sample in dataset.samples}
        assert (len(dataset.samples), len(found), labels & found) == (4, 2, set())
        labels |= found
    summary = json.loads((prepared / "long_tail.json").read_text())
    assert summary["pictures_of_a_class"] == {"head": [8, 8], "middle": [5, 4], "tail": [3, 2]}


def test_arms_differ_in_what_is_drawn_alone(tmp_path: Path) -> None:
    study = module("long_tail")
    recipes = {}
    for arm in study.ARMS:
        job = study.write_job(arm, tmp_path / arm, study.recipe_of(tmp_path, tmp_path / arm, arm, 10, 2560))
        recipes[arm] = load_recipe(str(job.recipe)).model_dump(exclude={"train": {"output"}})
    drawn = {arm: (recipe["data"].pop("balance"), recipe["data"].pop("draw")) for arm, recipe in recipes.items()}
    assert all(recipe == recipes["uniform"] for recipe in recipes.values())
    balance = str(tmp_path / "balance-own")
    assert drawn["bernoulli"] == (balance, "bernoulli")
    assert drawn["rotation"] == (balance, "rotation")
    assert drawn["half"] == (str(tmp_path / "balance-half"), "rotation")
    assert drawn["uniform"][0] == ""


def test_known_rates_are_half_of_the_pictures_and_by_class(prepared: Path) -> None:
    study = module("long_tail")
    study.make_known_rates(prepared, study.Balancing(clusters=0, merge_similarity=1.0, alpha=0.0, keep=0.5))
    manifest = read_manifest(prepared / "shards")
    half = read_balance(prepared / "balance-half", manifest).rates(0)
    assert sorted(half.tolist()) == [0.0] * 15 + [1.0] * 15
    by_class = read_balance(prepared / "balance-classes", manifest).rates(0).astype(float)
    heard = np.bincount(np.load(prepared / "ranks.npy"), weights=by_class)
    assert heard == pytest.approx([2.6, 2.6, 2.6, 2.6, 2.6, 2.0], rel=1e-2)  # flat, but nothing twice


def test_runs_are_compared_seed_by_seed(prepared: Path) -> None:
    study = module("long_tail")
    manifest = read_manifest(prepared / "shards")
    ranks = np.load(prepared / "ranks.npy")
    write_balance(
        prepared / "balance-own",
        manifest,
        [np.where(ranks < 2, 0.25, 1.0)],
        {"clusters": 3, "clusters_at_one": 2},
        True,
    )
    tails = {("uniform", 10): 0.1, ("uniform", 11): 0.3, ("rotation", 10): 0.2, ("rotation", 11): 0.5}
    lines = [
        {
            "name": f"{arm}-{seed}",
            "arm": arm,
            "seed": seed,
            "curve": [{"pairs": 5, "head": 0.6, "middle": 0, "tail": t}],
        }
        for (arm, seed), t in tails.items()
    ]
    (prepared / "runs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    figures = study.collect(prepared)
    assert figures["balance"]["own"]["mean_rate"] == {"head": 0.25, "middle": 1.0, "tail": 1.0}
    assert figures["balance"]["own"]["achieved_share"] == pytest.approx((16 * 0.25 + 14) / 30)
    assert figures["arms"]["uniform"]["mean"]["mean"] == pytest.approx((0.6 + 0.2) / 3, abs=1e-5)
    [difference] = [one for one in figures["comparisons"] if (one["of"], one["over"]) == ("rotation", "uniform")]
    assert difference["tail"]["mean"] == pytest.approx(0.15)
    half = 12.7062 * 0.1 / 2  # Student's t of one degree of freedom; differences of 0.1 and 0.2
    assert difference["tail"]["low"] == pytest.approx(0.15 - half, abs=1e-3)
    assert difference["head"]["p"] is None  # no differences
    row = module("draw_study").long_tail_table(figures).splitlines()[-1]
    assert row.startswith("| rotation | 2 | 60.0 ± 0.0 | 0.0 ± 0.0 | 35.0 ")
    assert "| +15.0 [-48.5, +78.5], p 0.205 |" in row
