"""Stages that read another edition of the data: the same samples in the same order, or a refusal that says why not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg_bytes, write_shards

from data_prep.editions import write_edition
from data_prep.shards.verify import verify
from formats.balance import write_balance
from formats.errors import UserError
from formats.manifest import read_manifest
from pipeline.data.captions import load_tokenizer
from pipeline.data.data_loader import Batch, MicroBatches, make_loader
from pipeline.data.training_data import TrainingData, read_training_data
from pipeline.recipe import Recipe
from pipeline.recipe_files import load_recipe
from pipeline.training.run_record import check_unchanged, write_record
from pipeline.training.stage_data import make_training_set
from pipeline.training.stage_plan import plan_stages


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pairs, of which one does not decode: verify leaves it out."""
    directory = write_shards(tmp_path_factory.mktemp("editions") / "full", [12, 15, 9], {"00000013.jpg": b"none"})
    verify(directory, 1, max_bad_ratio=1, again=True)
    return directory


@pytest.fixture(scope="module")
def small(full: Path) -> Path:
    write_edition(full, full.with_name("small"), 16, 90, 1)
    return full.with_name("small")


def staged(tokenizer_file: Path, train: Path | str, low: Path | str, *more: str) -> Recipe:
    overrides = [
        f"data.train={train}",
        f"data.tokenizer={tokenizer_file}",
        "model.name=ViT-test-8",
        "train.global_batch_size=8",
        "train.micro_batch_size=8",
        "stages.whole.train.global_batch_size=8",
        "stages.whole.train.micro_batch_size=8",
        "stages.small.train.max_steps=6",
        "stages.whole.train.max_steps=6",
        "stages.small.model.image_size=16",
        f"stages.small.data.train={low}",
    ]
    return load_recipe("tiny_staged", [*overrides, *more])


def batches(recipe: Recipe, stage_number: int, first: int) -> list[Batch]:
    """Of a stage, from its `first`-th step on."""
    data, tokenizer = read_training_data(recipe.data), load_tokenizer(recipe.data.tokenizer, 32)
    stage = plan_stages(recipe, data.epochs, 1, 300, 3)[stage_number]
    order = data.order(stage.recipe.data, stage.seed)
    dataset = make_training_set(stage, data.shards_of(stage.recipe.data), order, tokenizer)
    places = MicroBatches(stage.batches, 0, stage.first_step + first, stage.end_step)
    return list(make_loader(dataset, places, workers=0, pin_memory=False))


def keys(read: Sequence[Batch]) -> list[str]:
    """Of all samples in order, without the directories: shard and key."""
    return [key.rpartition("/")[2] for batch in read for key in batch.keys]


def test_the_low_stage_reads_the_small_edition_in_the_order_of_the_full_one(
    full: Path, small: Path, tokenizer_file: Path
) -> None:
    plain = staged(tokenizer_file, full, full)
    mixed = staged(tokenizer_file, full, small)
    for number in (0, 1):
        expected, found = batches(plain, number, 0), batches(mixed, number, 0)
        assert keys(found) == keys(expected)
        assert [b.tokens_N.tolist() for b in found] == [b.tokens_N.tolist() for b in expected]
        of_stage = small if number == 0 else full
        assert {key.rpartition("/")[0] for b in found for key in b.keys} == {str(of_stage)}
        assert not any(batch.problems for batch in found)
    assert len(set(keys(batches(mixed, 0, 0))[:35])) == 35, "an epoch without the sample that is left out"


def test_a_run_goes_on_with_another_edition(full: Path, small: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    """Begun on either, in the middle of a stage it goes on with the other: as if nothing had been changed."""
    recipes = [staged(tokenizer_file, train, low) for train in (full, small) for low in (full, small)]
    assert len({read_training_data(recipe.data).sha256 for recipe in recipes}) == 1
    rest = {tuple(keys(batches(recipe, 0, 3))) for recipe in recipes}
    assert len(rest) == 1
    assert rest == {tuple(keys(batches(recipes[0], 0, 0))[24:])}
    for before in recipes:
        run = tmp_path / str(recipes.index(before))
        run.mkdir()
        write_record(run, before, {"manifest_sha256": read_manifest(full).sha256})
        for after in recipes:
            check_unchanged(run, after, read_training_data(after.data).sha256, "", None)
    rates = [np.full(shard.samples, 0.5) for shard in read_manifest(full).shards]
    write_balance(tmp_path / "balance", read_manifest(full), rates, {})
    balanced = [staged(tokenizer_file, train, small, f"data.balance={tmp_path / 'balance'}") for train in (full, small)]
    assert keys(batches(balanced[0], 0, 0)) == keys(batches(balanced[1], 0, 0))


def test_sets_that_are_no_editions_are_refused(full: Path, small: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", [12, 14, 9])
    fewer = write_shards(tmp_path / "fewer", [12])
    lost = tmp_path / "lost"
    shutil.copytree(small, lost)
    (lost / "manifest.jsonl").write_text("".join((lost / "manifest.jsonl").read_text().splitlines(keepends=True)[:2]))
    same_counts = write_shards(tmp_path / "same", [12, 15, 9])
    changed = write_shards(tmp_path / "changed", [12, 15, 9], {"00000001.jpg": jpeg_bytes(77)})
    verify(changed, 1, max_bad_ratio=1, again=True)
    write_edition(changed, tmp_path / "of_another", 16, 90, 1)
    for train, low, message in (
        (full, other, "names no source"),
        (full, fewer, "it has 1 shards, that has 3"),
        (full, lost, "it has 2 shards, that has 3"),
        (full, same_counts, "it has 15 samples in 00001.tar where that has 14 in 00001.tar"),
        (same_counts, tmp_path / "of_another", "one of them changed since, or is another set's"),
        (full, f"[{small}, {other}]", "must name editions of the 1 sets"),
        (full, tmp_path / "absent", "no shard directory"),
    ):
        recipe = staged(tokenizer_file, train, low)
        with pytest.raises(UserError) as caught:
            read_training_data(recipe.data).shards_of(recipe.by_stage()[0][1].data)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    write_record(tmp_path, staged(tokenizer_file, full, small), {"manifest_sha256": read_manifest(full).sha256})
    with pytest.raises(UserError, match="started with other data"):
        check_unchanged(tmp_path, staged(tokenizer_file, lost, lost), read_manifest(lost).sha256, "", None)


def test_keys_are_compared_when_a_shard_is_opened(small: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    swapped = tmp_path / "swapped"
    shutil.copytree(small, swapped)
    lines = [json.loads(line) for line in (swapped / "manifest.jsonl").read_text().splitlines()]
    lines[2]["edition_of"]["keys_sha256"] = lines[1]["edition_of"]["keys_sha256"]
    (swapped / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"00002\.tar does not hold the keys of the shard of which it is an edition"):
        batches(staged(tokenizer_file, small, swapped), 0, 0)


def test_editions_of_a_mixture_stand_in_its_order(
    full: Path, small: Path, tokenizer_file: Path, tmp_path: Path
) -> None:
    other = write_shards(tmp_path / "other", [20])
    mixture = f"[{{path: {full}, weight: 3}}, {{path: {other}, weight: 1}}]"

    def shards_of(low: str) -> tuple[TrainingData, list[str]]:
        recipe = staged(tokenizer_file, mixture, low)
        data = read_training_data(recipe.data)
        return data, [shard.directory for shard in data.shards_of(recipe.by_stage()[0][1].data)]

    for low in (f"[{small}, {other}]", f"[{{path: {small}, weight: 6}}, {{path: {other}, weight: 2}}]"):
        data, directories = shards_of(low)
        assert directories == [str(small)] * 3 + [str(other)]
        assert data.weights == (3, 1)
    for low in (f"[{other}, {small}]", f"[{{path: {small}, weight: 1}}, {{path: {other}, weight: 1}}]"):
        with pytest.raises(UserError, match="edition"):
            shards_of(low)
