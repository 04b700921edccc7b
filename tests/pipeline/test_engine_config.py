"""DeepSpeed templates: completed from the recipe, refused where they say what the recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from formats.errors import UserError
from pipeline.data.sample_order import BatchPlan
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine_config import (
    deepspeed_config,
    precision_of,
    zero_stage,
)
from pipeline.training.engines.template import TEMPLATES_DIRECTORY
from pipeline.training.stage_plan import plan_batches
from pipeline.training.start_checks import Machine, check_config

PLAN = BatchPlan(num_samples=1000, global_batch_size=96, micro_batch_size=8, world_size=3)


CPU = Machine.of(torch.device("cpu"))
BF16 = {"bf16": {"enabled": True}}


def resolve(template: str, *options: str) -> dict[str, Any]:
    return deepspeed_config(load_recipe("demo", list(options)), PLAN, template)


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES_DIRECTORY.glob("*.json")))
def test_every_template_is_completed_from_the_recipe(template: str) -> None:
    config = resolve(template)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [config[key] for key in sizes] == [96, 8, 4]
    stage, precision, *_ = template.split("_")
    assert zero_stage(config) == int(stage.removeprefix("zero"))
    assert precision_of(config) == precision


@pytest.mark.parametrize("precision", ["bf16", "fp16", "autocast", "fp32"])
@pytest.mark.parametrize("template", ["zero1_bf16", "zero3_bf16_offload", "zero0_fp32"])
def test_the_recipe_chooses_another_precision_than_the_template(template: str, precision: str) -> None:
    usual, changed = resolve(template), resolve(template, f"train.precision={precision}")
    assert precision_of(changed) == precision
    for config in (usual, changed):
        for block in ("bf16", "fp16", "torch_autocast"):
            config.pop(block, None)
        config["zero_optimization"].pop("compute_grad_norm", None)  # whose norm: ours, but not in fp16
    assert usual == changed


def test_a_template_of_ones_own_keeps_what_it_says_of_its_precision(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    block = {"enabled": True, "initial_scale_power": 8}
    path.write_text(json.dumps({"fp16": block}))
    assert resolve(str(path))["fp16"] == resolve(str(path), "train.precision=fp16")["fp16"] == block
    path.write_text(json.dumps({"fp16": block, "bf16": {"enabled": True}}))
    with pytest.raises(UserError, match="turns on bf16 and fp16: keep one"):
        resolve(str(path))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"fp16": {"enabled": True}}, "fp16 needs a GPU: take train.precision=bf16 or fp32"),
        (BF16, "ZeRO stage 0 in bf16 loses accuracy"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param to nvme is not"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs ZeRO stage 3"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients need GPUs"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "8 does not divide 2 ranks"),
    ],
)
def test_what_cannot_work_is_refused_in_a_line(blocks: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(blocks, 2, CPU)


ZERO = "zero_optimization"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"zero_optimizaton": {"stage": 2}}, "unknown key 'zero_optimizaton': did you mean 'zero_optimization'?"),
        ({"dump_state": "yes"}, 'dump_state: true or false, not "yes"'),
        ({"gradient_predivide_factor": "two"}, 'gradient_predivide_factor: a number, not "two"'),
        ({"overlap_comm": True}, "unknown key 'overlap_comm': it belongs into zero_optimization"),
        ({ZERO: {"reduce_buckets_size": 5}}, f"{ZERO}: unknown key 'reduce_buckets_size': did you mean 'reduce_bucket"),
        ({ZERO: {"offload_param": {"devise": "cpu"}}}, "unknown key 'offload_param.devise': did you mean 'device'?"),
        ({"torch_autocast": {"enable": True}}, "unknown key 'torch_autocast.enable': did you mean 'enabled'?"),
        ({ZERO: {"stage": 4}}, f"{ZERO}.stage: ZeRO has the stages 0 to 3 (got 4)"),
        ({ZERO: {"stage": None}}, f"{ZERO}.stage: ZeRO has the stages 0 to 3 (got null)"),
        ({ZERO: {"stage": True}}, f"{ZERO}.stage: ZeRO has the stages 0 to 3 (got true)"),
        ({"data_types": {"grad_accum_dtype": "fp30"}}, "does not take what data_types says: 'fp30'"),
        ({"checkpoint": {"tag_validaton": "Warn"}}, "'checkpoint.tag_validaton': did you mean 'tag_validation'?"),
        ({"flops_profiler": {"enabled": False, "profil_step": 2}}, "unknown key 'flops_profiler.profil_step'"),
        ({ZERO: {"reduce_bucket_size": "many"}}, f"{ZERO}.reduce_bucket_size: Input should be a valid integer"),
        ({ZERO: {"stage": 3, "compute_grad_norm": False}}, f"{ZERO}: compute_grad_norm=false is supported only"),
        (
            {ZERO: {"stage": 3, "offload_param": {"device": "auto"}}},
            f'{ZERO}.offload_param.device: "auto" is filled in',
        ),
        ({"steps_per_print": "auto"}, 'steps_per_print: "auto" is filled in by transformers'),
        ({"fp16": False}, "fp16 is an object of options, not false"),
        ({ZERO: 2}, f"{ZERO} is an object of options, not 2"),
        ({"bf16": {"enabled": "false"}}, 'bf16.enabled is true or false, not "false"'),
        ({"comms_logger": 1}, "does not take what comms_logger says"),
        ({ZERO: {"stage": 2, "cpu_offload": True}}, "cpu_offload is an old name: write offload_optimizer"),
        ({"bfloat16": {"enabled": True}}, "bfloat16 is an old name: write bf16"),
        ([{"stage": 1}], "a DeepSpeed config is an object"),
        ("zero1", "a DeepSpeed config is an object"),
    ],
)
def test_a_template_that_deepspeed_would_ignore_or_fail_on_is_refused(
    template: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(template))
    with pytest.raises(UserError) as caught:
        resolve(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('{"zero_optimization": {"stage": 1, "overlap_comm": true, "stage": 3}}')
    with pytest.raises(UserError, match="the key 'stage' comes twice: keep one"):
        resolve(str(path))


def test_what_deepspeed_knows_is_left_to_it(tmp_path: Path) -> None:
    own = {
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 10, "param_persistence_threshold": 20},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]},
        "data_types": {"grad_accum_dtype": "fp32"},
        "checkpoint": {"tag_validation": "Fail", "use_node_local_storage": True},
        "flops_profiler": {"enabled": False, "profile_step": 2, "module_depth": 1, "output_file": None},
        "tensorboard": {"enabled": False, "output_path": "here"},
        "communication_data_type": "fp32",
    }
    (tmp_path / "mine.json").write_text(json.dumps(own))
    resolved = resolve(str(tmp_path / "mine.json"))
    assert {key: resolved[key] for key in own} == own


@pytest.mark.parametrize("key", ["train_batch_size", "gradient_clipping", "optimizer"])
def test_a_template_that_repeats_the_recipe_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({key: 1}))
    with pytest.raises(UserError, match=f"remove {key}"):
        deepspeed_config(load_recipe("demo"), PLAN, str(path))
    path.write_text("{")
    with pytest.raises(UserError, match="is not a JSON file"):
        deepspeed_config(load_recipe("demo"), PLAN, str(path))


def test_batch_arithmetic_is_shown_where_it_fails() -> None:
    recipe = load_recipe("demo", ["train.global_batch_size=100", "train.micro_batch_size=16"])
    with pytest.raises(UserError, match="100 is not a multiple of micro_batch_size 16 x 2 ranks = 32: take 96"):
        plan_batches(recipe, 1000, world_size=2)
    recipe = load_recipe("demo", ["train.global_batch_size=128", "train.micro_batch_size=16"])
    with pytest.raises(UserError, match=r"100 samples do not fill one global batch of 128 \(4 ranks x 32 each\)"):
        plan_batches(recipe, 100, world_size=4)
    assert plan_batches(recipe, 1000, world_size=4).accumulation_steps == 2
