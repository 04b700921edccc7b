"""Recipes: diffs over bases, overrides, and errors that say what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from formats.errors import UserError
from pipeline.recipe import Recipe
from pipeline.recipe_files import OPTIONS, RECIPES_DIRECTORY, load_recipe, read_recipe_file
from pipeline.recipe_options import describe_options, options_table


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
        ("optimizer.lr=1e300", "less than or equal to 100"),
        ("train.global_batch_size=1.5", "train.global_batch_size: Input should be a valid integer"),
        ("model.name=ViT-B16", "did you mean 'ViT-B-16'?"),
        ("model.name=ViT-B-64-quickgelu", "did you mean 'ViT-B-16-quickgelu'?"),
        ("model.pool=max", "model.pool: Input should be 'class', 'average' or 'attention' (got 'max')"),
        ("masking.strategy=clusters", "unknown masking strategy 'clusters'"),
        ("masking.target_mask_ratio=1.5", "target_mask_ratio must be in [0, 1)"),
        ("lr=1", "overrides look like section.key=value"),
        ("optimizer.lr", "overrides look like section.key=value"),
        ("optimizer.lr={", "optimizer.lr: Input should be a valid number"),
        ("optimizer.lr=inf", "optimizer.lr: Input should be a finite number"),
        ("optimizer.weight_decay=nan", "optimizer.weight_decay: Input should be a finite number"),
        ("masking.ema_decay=nan", "masking.ema_decay: Input should be a finite number"),
        ("train.output=caf\udce9", "is not UTF-8: write it so, or name another path"),
        ("data.train=[{path: a/b}, {path: ./a/b/}]", "each once"),
        ("train.seed=1e19", "train.seed: Input should be less than 9223372036854775808"),
        ("train.max_steps=1e-3", "train.max_steps: Input should be a valid integer"),
        ("data.workers=none", "data.workers: Input should be a valid integer"),
        ("masking.strateg=grid", "unknown option 'masking.strateg': did you mean 'masking.strategy'?"),
        ("evaluation.data=[a, b", "evaluation.data: '[a, b' is no list such as [a, b]"),
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
        ("model: {name: \udcff}", "cannot be read"),
        ("\x00", "cannot be read"),
        ("[" * 5000, "cannot be read"),
    ]:
        (tmp_path / "loop.yaml").write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match=message) as caught:
            load_recipe(str(tmp_path / "loop.yaml"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.output=runs/try #2", "runs/try #2"),
        ("train.output=2031-12-24", "2031-12-24"),
        ("train.output=007", "007"),
        ("train.output=a: {b", "a: {b"),
        ("train.output=no", "no"),
        ("log.wandb=off", "off"),
        ("log.wandb_project=1e3", "1e3"),
        ("train.max_steps=none", None),
        ("train.max_steps=2e3", 2000),
        ("train.max_steps=010", 10),
        ("model.image_size=None", None),
        ("model.pool=none", None),
        ("optimizer.lr=1e-3", 0.001),
        ("optimizer.lr=.5", 0.5),
        ("train.compile=on", True),
        ("train.compile=no", False),
        ("log.profile_steps=[3, 5]", (3, 5)),
        ("evaluation.data=sets/2031-12-24", ("sets/2031-12-24",)),
        ("evaluation.data=none", ()),
        ("evaluation.data=", ()),
        ("evaluation.data=[off, 007]", ("off", "007")),
        ("data.train=s3://bucket/~/shards:8", "s3://bucket/~/shards:8"),
    ],
)
def test_a_value_is_read_by_its_options_type(override: str, value: object, tmp_path: Path) -> None:
    """On the command line, and the same text in a file."""
    name, _, text = override.partition("=")
    section, key = name.split(".")
    file = tmp_path / "mine.yaml"
    quoted = text if text.startswith("[") else f"'{text}'" if set(text) & set("#{") else text
    file.write_text(f"base: tiny_cpu\n{section}: {{{key}: {quoted}}}\n")
    for recipe in (load_recipe("tiny_cpu", [override]), load_recipe(str(file))):
        read = getattr(getattr(recipe, section), key)
        assert (type(read), read) == (type(value), value)
        (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
        assert read_recipe_file(str(tmp_path / "recipe.yaml")) == recipe


def test_values_of_stages_are_read_by_type_too(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: tiny_cpu\nstages: [{name: on, train: {max_steps: none, epochs: 2}}]\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"), ["stages.on.optimizer.lr=2e-4"])
    assert recipe.stages == ({"name": "on", "train": {"max_steps": None, "epochs": 2.0}, "optimizer": {"lr": 2e-4}},)
    assert yaml.safe_load(recipe.to_yaml())["stages"][0]["optimizer"] == {"lr": 2e-4}, "a number, for who reads it"


def test_home_is_meant_by_a_tilde_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    paths = [name for name in OPTIONS if name.endswith((".train", ".tokenizer", ".output", ".start_from", ".resume"))]
    paths += ["train.deepspeed_config", "data.cache_directory", "text_masking.word_counts"]
    recipe = load_recipe("tiny_cpu", [*(f"{name}=~/x" for name in paths), "evaluation.data=[~/x, y]"]).model_dump()
    assert len(paths) == 8
    for section, key in (name.split(".") for name in paths):
        assert recipe[section][key] == "/home/ada/x", (section, key)
    assert recipe["evaluation"]["data"] == ("/home/ada/x", "y")
    mixed = load_recipe("tiny_cpu", ["data.train=[{path: ~/a, weight: 2}, {path: b, weight: 1}]"]).data.train
    assert [source.path for source in mixed] == ["/home/ada/a", "b"]


def test_help_and_docs_list_every_option_with_its_default() -> None:
    text = describe_options(OPTIONS)
    for section, fields in Recipe().model_dump(exclude={"stages"}).items():
        for name in fields:
            assert f" {section}.{name}=" in text
    assert all(option.description for option in OPTIONS.values())
    table = options_table(OPTIONS)
    assert table in (Path(__file__).parents[2] / "docs/options.md").read_text(), f"the page's table is to be:\n{table}"


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
