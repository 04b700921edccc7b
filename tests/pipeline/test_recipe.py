"""Recipes: diffs over bases, overrides, and errors that say what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats.errors import UserError
from pipeline.recipe import Recipe
from pipeline.recipe_files import RECIPES_DIRECTORY, describe_options, load_recipe, read_recipe_file


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES_DIRECTORY.glob("*.yaml")))
def test_every_recipe_loads_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert read_recipe_file(str(tmp_path / "recipe.yaml")) == recipe


def test_base_then_diff_then_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: base\noptimizer: {lr: 2e-3}\nmasking: {strategy: random}\n")
    (tmp_path / "child.yaml").write_text("base: mine.yaml\nmasking: {target_mask_ratio: 0.7}\n")
    recipe = load_recipe(str(tmp_path / "child.yaml"), ["optimizer.beta2=0.95", "train.max_steps=null"])
    assert recipe.optimizer.lr == 2e-3  # YAML 1.1 reads 2e-3 as text; a number is meant
    assert recipe.optimizer.beta2 == 0.95
    assert recipe.masking.strategy == "random"
    assert recipe.masking.target_mask_ratio == 0.7
    assert recipe.train.max_steps is None
    assert recipe.optimizer.warmup_steps == load_recipe("base").optimizer.warmup_steps


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lrr=1", "unknown option 'optimizer.lrr': did you mean 'optimizer.lr'?"),
        ("optimiser.lr=1", "unknown option 'optimiser': did you mean 'optimizer'?"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number"),
        ("optimizer.lr=-1", "greater than 0"),
        ("train.global_batch_size=1.5", "train.global_batch_size: Input should be a valid integer"),
        ("model.name=ViT-B16", "did you mean 'ViT-B-16'?"),
        ("model.name=ViT-B-64-quickgelu", "did you mean 'ViT-B-16-quickgelu'?"),
        ("model.pool=max", "model.pool: Input should be 'class', 'average' or 'attention' (got 'max')"),
        ("masking.strategy=clusters", "unknown masking strategy 'clusters'"),
        ("masking.target_mask_ratio=1.5", "target_mask_ratio must be in [0, 1)"),
        ("lr=1", "overrides look like section.key=value"),
        ("optimizer.lr", "overrides look like section.key=value"),
        ("optimizer.lr={", "cannot read the value"),
    ],
)
def test_a_wrong_override_is_one_clear_line(override: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo", [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_activation_that_the_name_contradicts_is_refused() -> None:
    with pytest.raises(UserError, match="ViT-B-16-quickgelu has quick_gelu: for gelu leave out the end of the name"):
        load_recipe("demo", ["model.name=ViT-B-16-quickgelu", "model.activation=gelu"])


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe 'dmo': did you mean 'demo'"):
        load_recipe("dmo")
    with pytest.raises(UserError, match="no recipe at"):
        load_recipe(str(tmp_path / "absent.yaml"))
    for content, message in [
        ("a: [", "cannot be read"),
        ("- 1", "expected sections"),
        ("base: loop.yaml", "lead back to itself"),
        ("model: 3", "model"),
    ]:
        (tmp_path / "loop.yaml").write_text(content)
        with pytest.raises(UserError, match=message) as caught:
            load_recipe(str(tmp_path / "loop.yaml"))
        assert "\n" not in str(caught.value)


def test_help_lists_every_option_with_its_default() -> None:
    text = describe_options()
    for section, fields in Recipe().model_dump().items():
        for name in fields:
            assert f"  {section}.{name}=" in text
    assert all(line.count(" ") > 2 and line.split()[1:] for line in text.splitlines())


def test_model_takes_image_size_and_vocabulary_from_recipe_and_tokenizer() -> None:
    recipe = load_recipe("demo", ["model.name=ViT-tiny-16", "model.image_size=144", "model.context_length=40"])
    config = recipe.clip_config(vocab_size=1234, eot_token_id=3)
    assert (config.vision.image_size, config.vision.num_patches) == (144, 81)
    assert (config.text.vocab_size, config.text.eot_token_id, config.text.context_length) == (1234, 3, 40)
    assert (config.vision.pool, config.activation) == ("class", "gelu")
    variants = ["model.name=ViT-tiny-16", "model.pool=attention", "model.activation=quick_gelu"]
    config = load_recipe("demo", variants).clip_config(10, 3)
    assert (config.vision.pool, config.activation) == ("attention", "quick_gelu")
    assert load_recipe("demo", ["model.name=ViT-B-16-quickgelu"]).clip_config(10, 3).activation == "quick_gelu"
    with pytest.raises(UserError, match="attentive looks through the class token"):
        load_recipe("demo", [*variants, "masking.strategy=attentive"]).clip_config(10, 3)
    with pytest.raises(UserError, match="multiple of patch_size"):
        load_recipe("demo", ["model.image_size=65"]).clip_config(10, 3)
