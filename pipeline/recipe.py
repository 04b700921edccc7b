"""Recipes: every option of a training run, typed, documented and checked before anything starts.

A recipe is a YAML file of sections; `base: NAME` makes it a diff over another one. `section.key=value` on the command
line has the last word.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import fsspec
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.attention_backends import BACKENDS, Backend
from model.config import Activation, CLIPConfig, Pool, config_from_name
from model.masking.config import SCHEDULES, STRATEGIES, MaskingConfig
from pipeline.errors import UserError
from pipeline.recipe_stages import find_stage, merge_stages

RECIPES_DIRECTORY = Path(__file__).parent / "recipes"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The two towers."""

    name: str = Field("ViT-B-16", description="ViT-{S,B,L,H}-{14,16,32}, as in open_clip, or ViT-tiny-16, ViT-tiny-8")
    image_size: int | None = Field(None, description="pixels a side; none: the model's own", gt=0)
    context_length: int | None = Field(None, description="longest caption in tokens; none: the model's own", gt=2)
    pool: Pool | None = Field(None, description="image feature: class | average | attention; none: the model's own")
    activation: Activation | None = Field(None, description="gelu | quick_gelu; none: the model's own")
    start_from: str = Field("", description="initial weights: a run, or open_clip's or transformers' (docs/export.md)")
    attention: Backend = Field("auto", description=" | ".join(BACKENDS) + " (model/attention_backends.py)")

    @model_validator(mode="after")
    def _known_model(self) -> ModelSection:
        own = config_from_name(self.name).activation
        if own == "quick_gelu" and self.activation == "gelu":
            raise ValueError(f"{self.name} has quick_gelu: for gelu leave out the end of the name")
        return self


class DataSection(_Section):
    """What to train on."""

    train: str = Field("", description="directory of tar shards with a manifest.jsonl, any fsspec URL")
    tokenizer: str = Field("", description="SentencePiece model, CLIP merges file, or clip-bpe")
    workers: int = Field(2, description="loader processes per rank; 0 decodes in the training process", ge=0)
    window_shards: int = Field(8, description="samples are shuffled within windows of this many shards", ge=1)
    crop_min_area: float = Field(0.9, description="random crops keep at least this share of the image", gt=0, le=1)
    max_bad_ratio: float = Field(0.01, description="stop if more than this share of samples is unusable", ge=0, le=1)


class MaskingSection(_Section):
    """Which patches each step drops (docs/masking.md)."""

    strategy: str = Field("cluster", description=" | ".join(STRATEGIES))
    target_mask_ratio: float = Field(0.5, description="share of the batch's patches that is dropped, exactly")
    min_mask_ratio: float = Field(0.3, description="each image loses at least this share (cluster, pgs)")
    max_mask_ratio: float = Field(0.9, description="each image loses at most this share (cluster, pgs)")
    anchor_ratio: float = Field(0.03, description="share of an image's patches that seed clusters (cluster, pgs)")
    embedding_mix: float = Field(0.0, description="weight of patch-embedding similarity at the end (cluster)")
    ratio_schedule: str = Field("constant", description="target over training: " + " | ".join(SCHEDULES))
    final_mask_ratio: float | None = Field(None, description="target at the last step, for another schedule")
    ema_decay: float = Field(0.996, description="per step, of the copy that scores patches (attentive)")

    @model_validator(mode="after")
    def _valid_masking(self) -> MaskingSection:
        self.to_config()
        return self

    def to_config(self) -> MaskingConfig:
        """The same as the model package knows it."""
        return MaskingConfig(**self.model_dump())


class TextMaskingSection(_Section):
    """What is left of long captions (docs/text_masking.md)."""

    strategy: Literal["none", "truncate", "random", "block", "frequency"] = Field(
        "none", description="none | truncate | random | block | frequency"
    )
    max_tokens: int | None = Field(
        None, description="longer captions are cut to this, start and end included; none: context length", gt=2
    )
    frequency_threshold: float = Field(1e-6, description="share of all words up to which a word is rare", gt=0)
    word_counts: str = Field("", description="words.json of `data-prep words`, any fsspec URL (frequency)")

    @model_validator(mode="after")
    def _counts_for_frequency(self) -> TextMaskingSection:
        if self.strategy == "frequency" and not self.word_counts:
            raise ValueError("strategy frequency needs word_counts=FILE, made by `data-prep words`")
        return self


class OptimizerSection(_Section):
    """AdamW with warm-up and cosine decay; no decay on biases, norms, embeddings and the temperature."""

    lr: float = Field(5e-4, description="peak learning rate", gt=0)
    final_lr_ratio: float = Field(0.0, description="learning rate at the end as a share of the peak", ge=0, le=1)
    warmup_steps: int = Field(2000, description="steps of linear warm-up", ge=0)
    weight_decay: float = Field(0.2, description="decoupled weight decay of matrices", ge=0)
    beta1: float = Field(0.9, description="decay of the first moment", ge=0, lt=1)
    beta2: float = Field(0.98, description="decay of the second moment", ge=0, lt=1)
    eps: float = Field(1e-6, description="added to the root of the second moment", gt=0)
    max_grad_norm: float = Field(1.0, description="gradients are clipped to this norm; 0: not at all", ge=0)


class TrainSection(_Section):
    """How long, how much at once, where to."""

    output: str = Field("", description="run directory: recipe, metrics, checkpoints")
    epochs: float = Field(32.0, description="passes over the data", gt=0)
    max_steps: int | None = Field(None, description="stop after this many steps; none: as epochs say", gt=0)
    global_batch_size: int = Field(2048, description="pairs per optimiser step, all ranks together", gt=0)
    micro_batch_size: int = Field(256, description="pairs per forward pass of one rank", gt=0)
    seed: int = Field(0, description="of initial weights, sample order, crops and masks", ge=0)
    deepspeed_config: str = Field("zero1_bf16", description="template in ds_configs/ (name) or a path")
    activation_checkpointing: bool = Field(False, description="recompute blocks backward: less memory, more time")
    compile: bool = Field(False, description="torch.compile the transformer blocks around attention")
    log_every_steps: int = Field(10, description="steps between lines of metrics.jsonl", gt=0)
    save_every_steps: int = Field(1000, description="steps between checkpoints; the last step always saves", gt=0)
    keep_checkpoints: int = Field(2, description="older checkpoints are deleted; at least 1", ge=1)


class Recipe(_Section):
    """All options of a run."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    masking: MaskingSection = MaskingSection()
    text_masking: TextMaskingSection = TextMaskingSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    stages: tuple[dict[str, Any], ...] = ()

    def by_stage(self) -> list[tuple[str | None, Recipe]]:
        """(name, recipe) of each stage in order (docs/training.md); without stages the recipe itself, nameless."""
        merged = merge_stages(self.model_dump(), self.stages)
        return [(name, Recipe.model_validate(fields)) for name, fields in merged] or [(None, self)]

    @model_validator(mode="after")
    def _captions_fit_the_context(self) -> Recipe:
        max_tokens = self.text_masking.max_tokens
        if max_tokens and max_tokens > self.context_length:
            raise ValueError(
                f"text_masking.max_tokens {max_tokens} exceeds the context length {self.context_length}: "
                "lower it, or raise model.context_length"
            )
        return self

    def to_yaml(self) -> str:
        """Every option resolved, the content of a run directory's recipe.yaml."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)

    def clip_config(self, vocab_size: int, eot_token_id: int) -> CLIPConfig:
        """The model's configuration with this recipe's image size and the tokenizer's vocabulary."""
        if self.masking.strategy == "attentive" and self.model.pool not in (None, "class"):
            raise UserError(
                "recipe: masking.strategy=attentive looks through the class token, which only model.pool=class trains"
            )
        fields = config_from_name(self.model.name).to_dict()
        fields["vision"]["image_size"] = self.model.image_size or fields["vision"]["image_size"]
        fields["vision"]["pool"] = self.model.pool or fields["vision"]["pool"]
        for tower in ("vision", "text"):
            fields[tower]["activation"] = self.model.activation or fields[tower]["activation"]
        fields["text"]["context_length"] = self.context_length
        fields["text"] |= {"vocab_size": vocab_size, "eot_token_id": eot_token_id}
        try:
            return CLIPConfig.from_dict(fields)
        except ValueError as error:
            raise UserError(f"recipe: model {self.model.name}: {error}") from error

    @property
    def context_length(self) -> int:
        """Longest caption in tokens."""
        return self.model.context_length or config_from_name(self.model.name).text.context_length


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (pipeline/recipes/) or path and apply `section.key=value` overrides.

    Raises UserError in one line: unknown names with the nearest valid one, wrong types with what was expected.
    """
    fields = _read_with_bases(name_or_path, seen=())
    for override in overrides:
        _apply_override(fields, override)
    return parse_recipe(fields, name_or_path)


def parse_recipe(fields: dict[str, Any], source: str) -> Recipe:
    """Check nested plain values, and what its stages make of them.

    Raises UserError that names the source, the stage, the key and the expectation.
    """
    recipe = _validate(fields, source)
    try:
        stages = merge_stages(recipe.model_dump(), recipe.stages)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    for name, merged in stages:
        _validate(merged, f"{source}: stage {name}")
    return recipe


def _validate(fields: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"{source}: {_unknown_key(first['loc'])}") from None
        message = first["msg"].removeprefix("Value error, ")
        got = "" if isinstance(first["input"], dict) else f" (got {first['input']!r})"
        where = f"{source}: {key}" if key else source
        raise UserError(f"{where}: {message}{got}") from None


def _read_with_bases(name_or_path: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = _find(name_or_path)
    if path in seen:
        raise UserError(f"recipe {path}: its bases lead back to itself")
    try:
        fields = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise UserError(f"recipe {path}: expected sections such as `model:` with `key: value` lines under them")
    base = fields.pop("base", None)
    if base is None:
        return fields
    beside = path.parent / str(base)
    merged = _read_with_bases(str(beside) if beside.exists() else str(base), (*seen, path))
    _merge(merged, fields)
    return merged


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.exists():
            raise UserError(f"no recipe at {path}")
        return path.resolve()
    known = sorted(path.stem for path in RECIPES_DIRECTORY.glob("*.yaml"))
    if name_or_path not in known:
        raise UserError(f"no recipe {name_or_path!r}{did_you_mean(name_or_path, known)}; known: {', '.join(known)}")
    return RECIPES_DIRECTORY / f"{name_or_path}.yaml"


def _merge(target: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], value)
        else:
            target[key] = value


def _apply_override(fields: dict[str, Any], override: str) -> None:
    """Set `section.key=value`, or `stages.NAME.section.key=value` in the named stage."""
    path, separator, text = override.partition("=")
    *stage, section, key = path.split(".") if "." in path else ("", path, "")
    if not separator or not key or (stage and (len(stage) != 2 or stage[0] != "stages")):
        raise UserError(
            f"cannot read {override!r}: overrides look like section.key=value, e.g. optimizer.lr=1e-3, "
            "or stages.NAME.section.key=value"
        )
    try:
        value = yaml.safe_load(text) if text else ""
        target = find_stage(fields.get("stages"), stage[1]) if stage else fields
    except ValueError as error:
        raise UserError(f"{override}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"cannot read the value of {override!r}: {' '.join(str(error).split())}") from error
    _merge(target, {section: {key: value}})


def _unknown_key(location: tuple[int | str, ...]) -> str:
    *sections, key = (str(part) for part in location)
    known = [name for name, _ in _fields() if not sections or name.startswith(f"{sections[0]}.")]
    if not sections:
        known = list(Recipe.model_fields)
    full = ".".join([*sections, key])
    return f"unknown option {full!r}{did_you_mean(full, known)}"


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or nothing if none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ""


def _fields() -> Iterator[tuple[str, Any]]:
    for section_name, section in Recipe.model_fields.items():
        section_type = section.annotation
        if not (isinstance(section_type, type) and issubclass(section_type, _Section)):
            continue  # stages, which have the options of all other sections
        for name, field in section_type.model_fields.items():
            yield f"{section_name}.{name}", field


def describe_options() -> str:
    """Every option with its default and meaning, one line each, for `--help`."""
    lines = ["  stages: a list of diffs over these, trained in turn (docs/training.md)"]
    for name, field in _fields():
        default = "none" if field.default is None else repr(field.default) if field.default == "" else field.default
        lines.append(f"  {name}={default}".ljust(42) + f" {field.description}")
    return "\n".join(lines)


def read_recipe_file(path: str) -> Recipe:
    """A run directory's recipe.yaml, resolved already; any fsspec URL."""
    with fsspec.open(path, "r") as file:
        return parse_recipe(yaml.safe_load(file.read()), path)
