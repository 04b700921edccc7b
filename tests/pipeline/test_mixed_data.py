"""Real loaders: what ranks and workers read before and after a restart, and from several sets at once."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import jpeg_bytes, write_shards

from formats.errors import UserError
from pipeline.data.captions import load_tokenizer
from pipeline.data.coverage import describe_coverage
from pipeline.data.data_loader import Batch, MicroBatches, TrainingSet, make_loader
from pipeline.data.sample_order import BatchPlan
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import TrainingData, read_training_data
from pipeline.recipe import DataSection, SourceSection, TextMaskingSection
from pipeline.recipe_files import load_recipe, read_recipe_file

SEED = 3


@pytest.fixture(scope="module")
def two_sets(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    """96 pairs and 12 others, read as one set."""
    other = write_shards(tmp_path_factory.mktemp("data") / "other", [7, 5])
    return DataSection.model_validate({"train": [{"path": str(shards)}, {"path": str(other)}], "window_shards": 2})


def make_set(section: DataSection, tokenizer_file: Path, crop_min_area: float) -> TrainingSet:
    data = read_training_data(section)
    captions = TextMasker(load_tokenizer(str(tokenizer_file), 64), TextMaskingSection())
    shards = ShardReader(data.shards, make_cache(section))
    return TrainingSet(shards, data.order(section, SEED), SEED, captions, 16, crop_min_area)


@pytest.fixture(scope="module")
def training_set(two_sets: DataSection, tokenizer_file: Path) -> TrainingSet:
    return make_set(two_sets, tokenizer_file, 0.9)


def read_steps(dataset: TrainingSet, plan: BatchPlan, steps: range, workers: int = 0) -> list[list[Batch]]:
    """The batches of each rank."""
    return [
        list(make_loader(dataset, MicroBatches(plan, rank, steps.start, steps.stop), workers, False))
        for rank in range(plan.world_size)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_after_a_resume_come_the_samples_of_an_undisturbed_run(workers: int, training_set: TrainingSet) -> None:
    """In mid-epoch and across its end (6.75 steps), two micro-batches a step, with another number of workers before."""
    plan = BatchPlan(108, 16, 4, 2)
    undisturbed = read_steps(training_set, plan, range(9), workers=2)
    resumed = read_steps(training_set, BatchPlan(108, 16, 4, 2, first_step=5, first_position=80), range(5, 9), workers)
    for whole, rest in zip(undisturbed, resumed, strict=True):
        assert [batch.keys for batch in whole[10:]] == [batch.keys for batch in rest]
        for a, b in zip(whole[10:], rest, strict=True):
            assert torch.equal(a.images_BCHW, b.images_BCHW)
            assert torch.equal(a.tokens_N, b.tokens_N)


def test_from_4_to_2_to_3_ranks_each_sample_comes_once(training_set: TrainingSet) -> None:
    """Batches of 16, 12 and 9 pairs: no multiple of each other, nor is the epoch of any."""
    read: list[str] = []
    step = 0
    for ranks, micro, accumulation, steps in [(4, 4, 1, 2), (2, 3, 2, 3), (3, 3, 1, 10)]:
        plan = BatchPlan(108, ranks * micro * accumulation, micro, ranks, step, len(read))
        of_ranks = read_steps(training_set, plan, range(step, step + steps), workers=1)
        for batches in zip(*of_ranks, strict=True):
            read += [key for batch in batches for key in batch.keys]
        step += steps
    assert set(Counter(read[:108]).values()) == {1}
    assert len(set(read)) == 108
    assert len(read) == 158  # and on into the next epoch, in another order
    assert read[108:] != read[:50]


def test_the_same_image_is_cropped_otherwise_at_each_position(tmp_path: Path, tokenizer_file: Path) -> None:
    same = {f"{number:08d}.jpg": jpeg_bytes(0) for number in range(20)}
    section = DataSection(train=str(write_shards(tmp_path / "same", [20], same)))
    data = make_set(section, tokenizer_file, 0.3)
    crops = {data[position].image_CHW.numpy().tobytes() for position in range(60)}
    assert len(crops) > 50


def mixture(shards: Sequence[Path], weights: Sequence[float]) -> DataSection:
    train = [{"path": str(path), "weight": weight} for path, weight in zip(shards, weights, strict=True)]
    return DataSection.model_validate({"train": train})


def test_weights_are_shares_of_the_samples(two_sets: DataSection) -> None:
    paths = [Path(source.path) for source in two_sets.train if not isinstance(source, str)]
    section = mixture(paths, [0.7, 0.3])
    data = read_training_data(section)
    assert data.weights == (7, 3)
    order = data.order(section, SEED)
    places = [order.locate(position) for position in range(1080)]
    assert sum(shard >= 3 for shard, _ in places) == 324
    assert set(Counter(place for place in places if place[0] >= 3).values()) == {27}  # 27 passes over 12 samples
    assert describe_coverage("epoch 10", data, order, [range(972, 1080)]).splitlines() == [
        "coverage of epoch 10: 108 seen, 88 of 108 unique, 20 repeated",
        f"  {paths[0]}: 76 seen, 76 of 96 unique, 0 repeated",
        f"  {paths[1]}: 32 seen, 12 of 12 unique, 20 repeated",
    ]
    assert read_training_data(two_sets).weights == (8, 1)
    described = data.describe_mixture(section, SEED)
    assert "data: 30.0% from" in described
    assert "2.70 passes over it per epoch" in described


def test_a_mixture_is_another_one_if_a_set_or_weight_changes(two_sets: DataSection, tmp_path: Path) -> None:
    first, second = (Path(source.path) for source in two_sets.train if not isinstance(source, str))

    def sha256(section: DataSection) -> str:
        return read_training_data(section).sha256

    moved = tmp_path / "moved"
    shutil.copytree(second, moved)
    whole = sha256(mixture([first, second], [8, 1]))
    assert whole == sha256(two_sets) == sha256(mixture([first, moved], [0.8, 0.1]))
    assert sha256(DataSection(train=str(first))) == read_training_data(two_sets).sets[0].sha256
    others = [mixture([first, second], [8, 2]), mixture([second, first], [1, 8]), DataSection(train=str(first))]
    manifest = moved / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"samples": 7', '"samples": 6'))
    others.append(mixture([first, moved], [8, 1]))
    assert len({whole, *map(sha256, others)}) == 5


def test_a_set_too_small_for_its_weight_is_refused(two_sets: DataSection) -> None:
    paths = [Path(source.path) for source in two_sets.train if not isinstance(source, str)]
    section = mixture(paths, [1, 1])
    data: TrainingData = read_training_data(section)
    order = data.order(section, SEED)
    data.check_batch(order, range(108), 24)
    with pytest.raises(UserError, match="has 12 samples, and its weight gives it 13 of a global batch of 26"):
        data.check_batch(order, range(108), 26)


def test_a_recipe_names_one_set_or_several(tmp_path: Path) -> None:
    assert load_recipe("base", ["data.train=[a, {path: b}]"]).data.train == (
        SourceSection(path="a"),
        SourceSection(path="b"),
    )
    recipe = load_recipe("base", ["data.train=[{path: a, weight: 2}, {path: b, weight: 0.5}]"])
    assert not isinstance(recipe.data.train, str)
    assert [(source.path, source.weight) for source in recipe.data.train] == [("a", 2), ("b", 0.5)]
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert read_recipe_file(str(tmp_path / "recipe.yaml")) == recipe
    assert load_recipe("base", ["data.train=a"]).data.train == "a"
    for value, message in {
        "[{path: a, wieght: 2}]": "data.train.list.0.wieght",
        "[{path: a, weight: 0}]": "greater than 0",
        "[{path: a, weight: inf}]": "finite",
        "[{weight: 1}]": "data.train.list.0.path: Field required",
        "[{path: a, weight: 1}, {path: b}]": "give a weight to every set",
        "[{path: a}, {path: a/}]": "each once",
        "[]": "one directory or more",
        "[[a], b]": "data.train.list.0",
    }.items():
        with pytest.raises(UserError) as caught:
            load_recipe("base", [f"data.train={value}"])
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
