"""DeepSpeed templates: completed from the recipe, refused where they say what the recipe says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data.sample_order import BatchPlan
from pipeline.errors import UserError
from pipeline.recipe_files import load_recipe
from pipeline.training.engine import TEMPLATES_DIRECTORY, deepspeed_config, zero_stage
from pipeline.training.stage_plan import plan_batches

PLAN = BatchPlan(num_samples=1000, global_batch_size=96, micro_batch_size=8, world_size=3)


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES_DIRECTORY.glob("*.json")))
def test_every_template_is_completed_from_the_recipe(template: str) -> None:
    config = deepspeed_config(load_recipe("demo", ["optimizer.max_grad_norm=0.7"]), PLAN, template)
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [config[key] for key in sizes] == [96, 8, 4, 0.7]
    stage, precision = template.split("_")
    assert zero_stage(config) == int(stage.removeprefix("zero"))
    assert config.get("bf16", {}).get("enabled", False) == (precision == "bf16")


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
