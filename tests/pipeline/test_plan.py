"""The planner's command line, its decisions, and what its closed forms must satisfy whatever their constants."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.errors import UserError
from model.clip import CLIP
from model.config import config_from_name
from pipeline import plan
from pipeline.hardware import find_accelerator, find_interconnect
from pipeline.planning.memory import estimate_memory, text_memory, vision_memory
from pipeline.planning.plan_tables import memory_warnings
from pipeline.planning.run_plan import Hardware, plan_run
from pipeline.planning.step_time import Traffic, micro_batch_flops, step_time, step_traffic
from pipeline.planning.workload import Workload, workload_of
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.stage_plan import plan_stages

SAMPLES = 10_970_000
NETWORK = find_interconnect("ndr")


def load_of(gpus: int = 8, micro_batch_size: int = 64, template: str = "zero1_bf16", *options: str) -> Workload:
    """What a rank of the base recipe computes."""
    sizes = [f"train.micro_batch_size={micro_batch_size}", f"train.global_batch_size={micro_batch_size * gpus}"]
    recipe = load_recipe("base", [*sizes, f"train.deepspeed_config={template}", *options])
    [stage] = plan_stages(recipe, SAMPLES, gpus, 49408, 49407)
    return workload_of(stage, deepspeed_config(stage.recipe, stage.batches, template), 16.0)


def test_a_plan_is_printed_as_text_and_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "base", "--gpus", "8", "--gpu", "a100", "--samples", str(SAMPLES)]
    assert plan.main(arguments) == 0
    text = capsys.readouterr().out
    assert plan.main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    [stage] = values["stages"]
    assert f"{values['gpu_hours']:,.0f} GPU-hours" in text
    assert f"{stage['step_s']:.3f} s a step" in text
    assert stage["parameters"] == sum(p.numel() for p in CLIP(config_from_name("ViT-B-16")).parameters())
    assert stage["memory"]["tensor_bytes"] == sum(stage["memory"]["parts_bytes"].values())
    assert values["gpu_hours"] == pytest.approx(stage["steps"] * stage["step_s"] * 8 / 3600)


def test_stages_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "efficient_vit_b16", "--gpus", "8", "--gpu", "h100", "--samples", str(SAMPLES), "--json"]
    assert plan.main(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in values["stages"]] == ["low", "full"]
    assert values["days"] * 86_400 == pytest.approx(sum(s["steps"] * s["step_s"] for s in values["stages"]))


def test_samples_come_from_the_manifest(
    shards: Path, tokenizer_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = [f"data.train={shards}", f"data.tokenizer={tokenizer_file}", "train.epochs=2"]
    arguments = ["--recipe", "demo", "--gpus", "1", "--gpu", "a100", "--json", "train.global_batch_size=16"]
    assert plan.main([*arguments, "train.micro_batch_size=16", *options]) == 0
    [stage] = json.loads(capsys.readouterr().out)["stages"]
    assert stage["samples"] == 2 * 96
    assert stage["communication"] == []
    copy = shutil.copytree(shards, tmp_path / "copy")
    twice = f"data.train=[{{path: {shards}, weight: 1}}, {{path: {copy}, weight: 9}}]"
    with pytest.raises(UserError, match="its weight gives it"):
        plan.main([*arguments, "train.global_batch_size=128", "train.micro_batch_size=128", *options[1:], twice])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--gpu", "h10"], "no data of a GPU 'h10': did you mean 'h100'"),
        (["--interconnect", "nrd"], "did you mean 'ndr'"),
        (["--interconnect", "0"], "an interconnect of 0 GB/s sends nothing"),
        (["--interconnect=-2.5"], "an interconnect of -2.5 GB/s"),
        (["--interconnect", "nan"], "an interconnect of nan GB/s"),
        (["--interconnect", "inf"], "an interconnect of inf GB/s"),
        (["--gpu", "v100"], "a v100 does not compute in bf16: take train.precision=fp16"),
        (["--gpu", "v100", "train.precision=autocast"], "a v100 does not compute in bf16"),
        (["train.deepspeed_config=zero0_fp32", "train.precision=fp16"], "ZeRO stage 0 in fp16 loses accuracy"),
        (["optimizer.name=muon", "train.deepspeed_config=zero3_bf16"], "muon does not work with ZeRO stage 3"),
        (["train.deepspeed_config=zero3_bf16_zeropp", "--gpus", "4"], "8 does not divide 4 ranks"),
        (["train.micro_batch_size=1", "--gpus", "1"], "1 x 1 rank = 1 pair at once, which meets no other"),
        (["--gpus", "7"], "take 1792, or another micro_batch_size"),
        (["data.train=/nowhere"], "no shard directory at /nowhere"),
    ],
)
def test_mistakes_are_one_line(changed: list[str], message: str) -> None:
    samples = [] if "data.train=/nowhere" in changed else ["--samples", str(SAMPLES)]
    with pytest.raises(UserError, match=message) as error:
        plan.main(["--recipe", "base", "--gpus", "8", "--gpu", "a100", *samples, *changed])
    assert "\n" not in str(error.value)


def test_names_and_numbers_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*arguments: str) -> dict[str, Any]:
        assert plan.main(["--recipe", "base", "--gpus", "16", "train.micro_batch_size=128", "--json", *arguments]) == 0
        values: dict[str, Any] = json.loads(capsys.readouterr().out)
        return values

    usual = planned("--gpu", "h100", "--interconnect", "ndr", "--samples", "10000000")
    assert usual == planned("--gpu", "H100", "--interconnect", "NDR", "--samples", "1e7")
    assert usual["gpu_hours"] < planned("--gpu", "h100", "--interconnect", "1.5", "--samples", "1e7")["gpu_hours"]
    for samples in ("1e-3", "2.5", "0", "-1e7", "nan", "many"):
        with pytest.raises(SystemExit):
            planned("--gpu", "h100", f"--samples={samples}")
        assert "argument --samples: must be a" in capsys.readouterr().err


def test_an_older_gpu_is_planned_without_flash_attention() -> None:
    recipe = load_recipe("base", ["train.precision=fp16"])
    older, newer = (
        plan_run(recipe, Hardware(8, find_accelerator(name), NETWORK), SAMPLES, 16.0, 49408, 49407).stages[0]
        for name in ("v100", "a100")
    )
    assert (older.load.attention, newer.load.attention) == ("rectangles", "varlen")


def test_a_warm_up_longer_than_the_run_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "base", "--gpus", "8", "--gpu", "a100", "--samples", "1e6", "train.max_steps=50"]
    assert plan.main(arguments) == 0
    assert "warning: optimizer.warmup_steps 2,000 are more than the 50 steps" in capsys.readouterr().out


def test_without_data_the_number_of_samples_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"give --samples N, or data\.train="):
        plan.main(["--recipe", "base", "--gpus", "8", "--gpu", "a100"])


def test_what_does_not_fit_is_said_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["model.name=ViT-H-14", "train.micro_batch_size=512", "train.global_batch_size=4096"]
    arguments = ["--recipe", "base", "--gpus", "8", "--gpu", "a100", "--samples", str(SAMPLES), "--json"]
    assert plan.main([*arguments, *options]) == 1
    values = json.loads(capsys.readouterr().out)
    [stage] = values["stages"]
    suggestion = stage["suggestion"]
    assert stage["memory"]["device_bytes"] > values["memory_bytes"] > suggestion["device_bytes"]
    chosen = [f"{name}={str(value).lower()}" for name, value in suggestion.items() if name.startswith("train.")]
    assert plan.main([*arguments, *options, *chosen]) == 0
    [followed] = json.loads(capsys.readouterr().out)["stages"]
    assert followed["step_s"] == pytest.approx(suggestion["step_s"])
    assert followed["micro_batch_size"] == 512  # as many negatives as before


def test_a_run_is_told_of_a_memory_that_is_too_small() -> None:
    recipe = load_recipe("base", ["model.name=ViT-L-14", "train.micro_batch_size=2048", "train.global_batch_size=2048"])
    stages = plan_stages(recipe, SAMPLES, 1, 49408, 49407)
    card = dataclasses.replace(find_accelerator("a100"), name="this card")
    [warning] = memory_warnings(stages, card)
    needed = estimate_memory(workload_of(stages[0], deepspeed_config(recipe, stages[0].batches, "zero1_bf16"), 16))
    assert f"{needed.device_bytes / 1e9:.1f} GB are needed" in warning
    assert "this card has 84.8; what would fit: train." in warning
    assert memory_warnings(stages, card.with_memory(1024)) == []
    [warning] = memory_warnings(stages, card.with_memory(1))
    assert warning.endswith("what would fit: take more ranks, or a smaller batch")


def test_nothing_fits_a_tiny_memory() -> None:
    tiny = dataclasses.replace(find_accelerator("a100"), memory_bytes=1 << 31)
    recipe = load_recipe("base", ["model.name=ViT-H-14"])
    plans = plan_run(recipe, Hardware(8, tiny, NETWORK), SAMPLES, 16.0, 49408, 49407)
    assert not plans.fits
    assert plans.stages[0].suggestion is None


def test_few_cores_make_the_loader_bind(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "base", "--gpus", "8", "--gpu", "h100", "--samples", str(SAMPLES)]

    def planned(*options: str) -> dict[str, Any]:
        assert plan.main([*arguments, "--json", *options]) == 0
        values: dict[str, Any] = json.loads(capsys.readouterr().out)
        return values

    free = planned()
    cores = free["stages"][0]["loader_cores_per_gpu"]
    assert planned("--cores-per-gpu", str(cores + 0.1)) == free
    bound = planned("--cores-per-gpu", str(cores / 2))
    assert bound["gpu_hours"] == pytest.approx(2 * free["gpu_hours"])
    assert bound["stages"][0]["step_s"] == free["stages"][0]["step_s"]
    assert plan.main([*arguments, "--cores-per-gpu", str(cores / 2)]) == 0
    assert "bound by the loader" in capsys.readouterr().out


def test_a_stage_that_reads_small_pictures_takes_fewer_cores(capsys: pytest.CaptureFixture[str]) -> None:
    def stages(*options: str) -> list[dict[str, Any]]:
        arguments = ["--recipe", "efficient_vit_b16", "--gpus", "8", "--gpu", "h100", "--samples", "298000000"]
        assert plan.main([*arguments, "--cores-per-gpu", "8", "--json", "data.train=set", *options]) == 0
        values: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["stages"]
        return values

    (low, full), (small_low, small_full) = stages(), stages("stages.low.data.train=small")
    assert full == small_full
    ratio = small_low["samples_per_core_s"] / low["samples_per_core_s"]
    assert ratio > 2
    assert small_low["loader_cores_per_gpu"] == pytest.approx(low["loader_cores_per_gpu"] / ratio)
    assert small_low["fed_step_s"] == small_low["step_s"] < low["fed_step_s"]


@settings(deadline=None, max_examples=30)
@given(
    small=st.integers(1, 512),
    more=st.integers(1, 512),
    checkpointing=st.booleans(),
    precision=st.sampled_from(["bf16", "autocast", "fp32"]),
)
def test_memory_and_operations_grow_with_the_micro_batch(
    small: int, more: int, checkpointing: bool, precision: str
) -> None:
    options = [f"train.activation_checkpointing={checkpointing}", f"train.precision={precision}"]
    less, larger = (load_of(8, size, "zero1_bf16", *options) for size in (small, small + more))
    assert estimate_memory(less).tensor_bytes < estimate_memory(larger).tensor_bytes
    assert micro_batch_flops(less) < micro_batch_flops(larger)


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14", "ViT-H-14"])
def test_sharing_out_more_takes_less(name: str) -> None:
    loads = {
        stage: dataclasses.replace(
            load_of(64, 8, "zero0_fp32", f"model.name={name}"),
            zero_stage=stage,
            reduce_bucket=1_000_000,
            max_live=10_000_000,  # DeepSpeed's own default keeps weights up to a billion gathered
        )
        for stage in range(4)
    }
    totals = [estimate_memory(load).tensor_bytes for load in loads.values()]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("precision", ["bf16", "autocast", "fp32"])
def test_recomputation_takes_less_memory_and_more_time(precision: str) -> None:
    stored = load_of(8, 256, "zero1_bf16", f"train.precision={precision}")
    again = dataclasses.replace(stored, checkpoint_blocks=True)
    assert estimate_memory(again).tensor_bytes < 0.7 * estimate_memory(stored).tensor_bytes
    h100 = find_accelerator("h100")
    assert step_time(again, h100, NETWORK).compute_s == pytest.approx(
        4 / 3 * step_time(stored, h100, NETWORK).compute_s
    )


def test_a_frozen_tower_keeps_nothing() -> None:
    load = load_of(8, 64, "zero1_bf16", "optimizer.image_lr_ratio=0")
    assert vision_memory(load).saved == 0
    assert text_memory(load).saved == text_memory(load_of()).saved
    assert load.parameters.trained == load.parameters.text + 1  # and the temperature


@pytest.mark.parametrize(
    ("operation", "expected"), [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("send", 1.0)]
)
def test_a_ring_of_four_sends(operation: str, expected: float) -> None:
    assert Traffic("x", operation, 1000).wire_bytes(4) == expected * 1000  # type: ignore[arg-type]


def test_collectives_that_do_not_overlap_are_waited_for() -> None:
    slow = find_interconnect("0.1")
    accelerator = find_accelerator("h100")
    load = load_of(64, 64)
    estimate = step_time(load, accelerator, slow)
    assert estimate.exposed_s == pytest.approx(estimate.communication_s)
    hidden = step_time(dataclasses.replace(load, overlaps_reduction=True), accelerator, slow)
    assert 0 < hidden.exposed_s < hidden.communication_s
    assert step_time(load_of(1, 64), accelerator, slow).communication_s == 0


def test_a_given_utilisation_is_taken() -> None:
    estimate = step_time(load_of(1), find_accelerator("h100"), NETWORK, mfu=0.4)
    assert estimate.mfu == pytest.approx(0.4)


def test_gathers_happen_once_a_step_with_cached_gradients() -> None:
    options = ["train.global_batch_size=2048", "loss.cache_gradients=true"]
    cached = load_of(8, 64, "zero1_bf16", *options)
    per_micro_batch = dataclasses.replace(cached, cache_gradients=False)
    assert cached.accumulation_steps == 4
    assert step_traffic(cached) == step_traffic(per_micro_batch)  # the same rows, in one call or in four
