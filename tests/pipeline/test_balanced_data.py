"""A balance on its way from a recipe to batches: stages, mixtures, real loaders, what a run says and refuses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import write_shards

from formats.balance import read_balance, write_balance
from formats.errors import UserError
from formats.manifest import read_manifest
from pipeline.data.balanced_order import BalancedOrder
from pipeline.data.captions import load_tokenizer
from pipeline.data.coverage import cover, describe_coverage, describe_reads
from pipeline.data.data_loader import Batch, MicroBatches, TrainingSet, make_loader
from pipeline.data.sample_order import BatchPlan
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import read_training_data
from pipeline.recipe import DataSection, Recipe, TextMaskingSection
from pipeline.recipe_files import load_recipe, parse_recipe
from pipeline.training.run_record import check_unchanged, write_record
from pipeline.training.stage_plan import plan_stages

SIZES = [40, 31, 25]
SEED = 3


def balance(shards: Path, folder: Path, rates: Sequence[Sequence[float]] | float) -> str:
    """A folder of rates: of each sample, or the same for all."""
    manifest = read_manifest(shards)
    of_shards = (
        [np.full(s.samples, rates) for s in manifest.shards] if isinstance(rates, float) else map(np.array, rates)
    )
    write_balance(folder, manifest, of_shards, {"clusters": 2, "clusters_at_one": 1})
    return str(folder)


@pytest.fixture(scope="module")
def thinned(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the first shard a fifth is read, of the second all, of the third every sample one to two times."""
    rates = [[0.2] * 40, [1.0] * 31, [1.5] * 25]
    return balance(shards, tmp_path_factory.mktemp("balance") / "thinned", rates)


def make_set(section: DataSection, tokenizer_file: Path) -> TrainingSet:
    data = read_training_data(section)
    captions = TextMasker(load_tokenizer(str(tokenizer_file), 64), TextMaskingSection())
    shards = ShardReader(data.shards, make_cache(section))
    return TrainingSet(shards, data.order(section, SEED), SEED, captions, 16, 0.9)


def read_steps(dataset: TrainingSet, plan: BatchPlan, steps: range, workers: int) -> list[Batch]:
    """The batches of both ranks, in order."""
    of_ranks = [list(make_loader(dataset, MicroBatches(plan, rank, *_ends(steps)), workers, False)) for rank in (0, 1)]
    return [batch for both in zip(*of_ranks, strict=True) for batch in both]


def _ends(steps: range) -> tuple[int, int]:
    return steps.start, steps.stop


def test_real_loaders_go_on_where_they_were(shards: Path, thinned: str, tokenizer_file: Path) -> None:
    """Across the ends of epochs and laps, with other workers and another batch after the restart."""
    section = DataSection(train=str(shards), balance=thinned)
    dataset = make_set(section, tokenizer_file)
    undisturbed = read_steps(dataset, BatchPlan(77, 8, 4, 2), range(24), workers=0)
    rest = read_steps(dataset, BatchPlan(77, 12, 6, 2, first_step=6, first_position=48), range(6, 18), workers=2)
    keys = [key for batch in undisturbed for key in batch.keys]
    assert [key for batch in rest for key in batch.keys] == keys[48:]
    for batch in rest:
        assert len(set(batch.keys)) == len(batch.keys)
    two_epochs = read_training_data(section).order(section, SEED).epochs.start(2)
    of_shards = Counter(key.split("/")[-1].split(".")[0] for key in keys[:two_epochs])
    assert of_shards == {
        "00000": pytest.approx(16, abs=9),
        "00001": 62,
        "00002": pytest.approx(75, abs=9),
    }


def test_what_is_not_drawn_is_not_decoded_and_its_shard_not_opened(tmp_path: Path, tokenizer_file: Path) -> None:
    damaged = {f"{number:08d}.jpg": b"no picture" for number in range(20, 40)}
    shards = write_shards(tmp_path / "shards", [20, 20, 20], damaged)
    (shards / "00001.tar").unlink()
    rates = [[1.0] * 20, [0.0] * 20, [0.0, 1.0] * 10]
    section = DataSection(train=str(shards), balance=balance(shards, tmp_path / "balance", rates), window_shards=1)
    dataset = make_set(section, tokenizer_file)
    samples = [dataset[position] for position in range(60)]
    assert [sample.problems for sample in samples] == [[]] * 60
    assert set(Counter(sample.key for sample in samples).values()) == {2}


def test_a_plan_counts_what_each_stage_draws(shards: Path, thinned: str, tmp_path: Path) -> None:
    half = balance(shards, tmp_path / "half", 0.5)
    stages = [
        {"name": "one", "data": {"balance": thinned}, "train": {"epochs": 2}},
        {"name": "two", "data": {"balance": half, "draw": "bernoulli"}, "train": {"epochs": 1.5}},
        {"name": "whole", "train": {"epochs": 1}},
    ]
    train = {"global_batch_size": 8, "micro_batch_size": 8, "seed": SEED}
    recipe = parse_recipe({"data": {"train": str(shards)}, "train": train, "stages": stages}, "test")
    data = read_training_data(recipe.data)
    planned = plan_stages(recipe, data.epochs, 1, 300, 3)
    orders = [data.order(stage.recipe.data, SEED) for stage in planned]
    first_epoch = 0
    for stage, order, epochs in zip(planned, orders, (2, 1.5, 1), strict=True):
        start, whole = order.epochs.start(first_epoch), int(epochs)
        wanted = order.epochs.start(first_epoch + whole) - start
        wanted += round((epochs - whole) * (order.epochs.start(first_epoch + whole + 1) - start - wanted))
        assert stage.first_position == start
        assert (stage.planned_samples, stage.num_steps) == (wanted, math.ceil(wanted / 8))
        data.check_batch(order, stage.own_positions, 8)
        first_epoch = order.epochs.at(stage.own_positions[-1]) + 1
    assert [stage.batches.num_samples for stage in planned] == [76, 48, 96]
    reads = list(zip(orders, planned[-1].positions(planned[-1].end_step), strict=True))
    (half_read,) = cover(orders[1], [planned[1].own_positions])
    assert half_read.unique < 96
    assert "96 of 96 unique" in describe_reads("the run", data, reads)
    stretch = range(orders[1].epochs.start(4))
    own = orders[1].orders[0]
    assert isinstance(own, BalancedOrder)
    at_most = own.largest_batch(stretch)
    assert 10 < at_most < 18, "a third of the shorter of two epochs that follow each other"
    data.check_batch(orders[1], stretch, at_most)
    message = f"only {at_most} samples in a row are sure to differ, fewer than a global batch of {at_most + 1}"
    with pytest.raises(UserError, match=message):
        data.check_batch(orders[1], stretch, at_most + 1)


def test_coverage_is_told_by_thirds(shards: Path, thinned: str) -> None:
    section = DataSection(train=str(shards), balance=thinned)
    data = read_training_data(section)
    order = data.order(section, SEED)
    epoch = range(order.epochs.start(3), order.epochs.start(4))
    places = [order.locate(position) for position in epoch]
    drawn, seen = Counter(shard for shard, _ in places), Counter(shard for shard, _ in set(places))
    assert describe_coverage("epoch 4", data, order, [epoch]).splitlines() == [
        f"coverage of epoch 4: {len(epoch)} seen, {sum(seen.values())} of 96 unique, {len(epoch) - sum(seen.values())} "
        "repeated",
        f"  head (rates up to 0.2) {drawn[0]} drawn, {seen[0]} of 40 seen; middle (rates up to 1) {drawn[1]} drawn, 31 "
        f"of 31 seen; tail (rates up to 1.5) {drawn[2]} drawn, 25 of 25 seen",
    ]
    assert data.describe_mixture(section, SEED) == (
        f"balance: rotation of 76.5 samples per epoch, rates up to 1.5, an epoch in 2 laps ({thinned})\n"
    )


def test_a_mixture_balances_each_set(shards: Path, thinned: str, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", [30])
    sources = [{"path": str(shards)}, {"path": str(other)}]
    section = DataSection.model_validate({"train": sources, "balance": [thinned, "none"]})
    data = read_training_data(section)
    order = data.order(section, SEED)
    epochs = 40
    counts = Counter(order.locate(position) for position in range(epochs * order.num_samples))
    own_rates = [float(rate) for number in range(3) for rate in read_balance(thinned, data.sets[0]).rates(number)]
    expected = sum(own_rates)
    assert order.num_samples == round(expected) + 30
    assert order.weights[0] / sum(order.weights) == pytest.approx(expected / (expected + 30), rel=1e-3)
    for (shard, _), count in counts.items():
        assert count == pytest.approx([0.2, 1, 1.5, 1][shard] * epochs, abs=2)
    data.check_batch(order, range(6), 6)  # a stage of one step, of which a set has fewer than it could
    weighted = [{"path": str(shards), "weight": 1}, {"path": str(other), "weight": 3}]
    section = DataSection.model_validate({"train": weighted, "balance": [thinned, "none"]})
    assert read_training_data(section).order(section, SEED).weights == (1, 3)


def test_a_run_is_not_continued_with_another_balance(shards: Path, thinned: str, tmp_path: Path) -> None:
    def recipe(folder: str) -> Recipe:
        return load_recipe("demo", [f"data.train={shards}", f"data.balance={folder}"])

    def sha256(folder: str) -> str | None:
        return read_training_data(recipe(folder).data).balance_sha256(recipe(folder))

    moved, other = tmp_path / "moved", balance(shards, tmp_path / "other", 0.9)
    balance(shards, moved, [[0.2] * 40, [1.0] * 31, [1.5] * 25])
    record = {"manifest_sha256": "aa", "tokenizer_sha256": "bb", "balance_sha256": sha256(thinned)}
    write_record(tmp_path / "run", recipe(thinned), record)
    check_unchanged(tmp_path / "run", recipe(str(moved)), "aa", "bb", None, sha256(str(moved)))
    for changed in (other, "none"):
        with pytest.raises(UserError, match=r"was started with another data\.balance"):
            check_unchanged(tmp_path / "run", recipe(changed), "aa", "bb", None, sha256(changed))
    write_record(tmp_path / "run", recipe("none"), {"manifest_sha256": "aa", "tokenizer_sha256": "bb"})
    with pytest.raises(UserError, match=r"another data\.balance \(none, now balance_sha256"):
        check_unchanged(tmp_path / "run", recipe(thinned), "aa", "bb", None, sha256(thinned))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": "a", "balance": ["x", "y"]}, "train has 1 sets, balance 2"),
        ({"train": [{"path": "a"}, {"path": "b"}], "balance": "x"}, "train has 2 sets, balance 1"),
        ({"train": "a", "balance": "x", "sampling": "with_replacement"}, "take sampling without_replacement"),
        ({"train": "a", "balance": "x", "draw": "often"}, "data.draw"),
    ],
)
def test_what_does_not_go_together_is_said(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_recipe({"data": fields}, "test")
