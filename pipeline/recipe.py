"""Recipes: every option of a training run, typed, documented and checked before anything starts.

A field says all about its option: type, limits, default, meaning; `PerStage`: a stage may change it; `OnResume`: a run
may be continued with another value. pipeline/recipe_files.py reads recipes.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Any, Literal

import yaml
from pydantic import Discriminator, Field, Tag, model_validator

from formats.errors import UserError
from model.attention import BACKENDS, Backend
from model.config import Activation, CLIPConfig, Pool, TextAttention, TextPool, config_from_name
from model.loss import Kernel, LossKind
from model.masking.strategies import MaskingConfig
from pipeline.recipe_options import Location, OnResume, PerStage, Section, merge_stages, options_of

Precision = Literal["bf16", "fp16", "autocast", "fp32"]
DrawKind = Literal["rotation", "bernoulli"]
CurriculumKind = Literal["concepts", "none", "length", "rarity", "masking_ratio"]

# Zhai et al. 2023 (SigLIP), section 3.2: at first nearly every pair is taken for a negative, as nearly every pair is.
_SIGMOID_LOGIT_SCALE, _SIGMOID_LOGIT_BIAS = math.log(10), -10.0


class ModelSection(Section):
    """The two towers."""

    name: str = Field("ViT-B-16", description="ViT-{S,B,L,H}-{14,16,32}, as in open_clip, or ViT-tiny-16, ViT-tiny-8")
    image_size: PerStage[int | None] = Field(None, description="pixels a side; none: the model's own", gt=0)
    context_length: int | None = Field(None, description="longest caption in tokens; none: the model's own", gt=2)
    pool: Pool | None = Field(None, description="image feature: class | average | attention; none: the model's own")
    text_attention: TextAttention = Field("causal", description="what a caption's tokens see: causal | bidirectional")
    text_pool: TextPool = Field("last", description="caption's feature: last token | mean over all (bidirectional)")
    activation: Activation | None = Field(None, description="gelu | quick_gelu; none: the model's own")
    start_from: OnResume[Location] = Field(
        "", description="initial weights: a run, or open_clip's or transformers' (docs/export.md)"
    )
    attention: Backend = Field("auto", description=" | ".join(BACKENDS) + " (model/attention.py)")

    @model_validator(mode="after")
    def _known_model(self) -> ModelSection:
        own = config_from_name(self.name).activation
        if own == "quick_gelu" and self.activation == "gelu":
            raise ValueError(f"{self.name} has quick_gelu: for gelu leave out the end of the name")
        return self


class SourceSection(Section):
    """One of several sets to train on."""

    path: Location = Field(min_length=1)
    weight: float | None = Field(None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


def _kind_of_source(value: object) -> str:
    return "path" if isinstance(value, str) else "list"


_Sources = Annotated[
    Annotated[Location, Tag("path")] | Annotated[tuple[SourceSection, ...], Tag("list")], Discriminator(_kind_of_source)
]


class DataSection(Section):
    """What to train on."""

    # the manifest's hash is compared instead, as those of the tokenizer, the word counts and the weights started from;
    # a stage may read the same samples from another edition
    train: PerStage[OnResume[_Sources]] = Field(
        "",
        description="directory of tar shards, any fsspec URL; or [{path, weight}, …] to mix; a stage: editions of it",
    )
    sampling: Literal["without_replacement", "with_replacement"] = Field(
        "without_replacement", description="without_replacement: each sample once per epoch | with_replacement"
    )
    balance: PerStage[OnResume[Location | tuple[Location, ...]]] = Field(
        "", description="folder of `data-prep balance`: how often each sample comes; [A, B] for several sets"
    )
    draw: PerStage[DrawKind] = Field(
        "rotation", description="with a balance: rotation: equally spaced | bernoulli: at random in each epoch"
    )
    tokenizer: OnResume[Location] = Field("", description="SentencePiece model, CLIP merges file, or clip-bpe")
    workers: OnResume[int] = Field(2, description="loader processes per rank; 0 decodes in the training process", ge=0)
    cache_directory: OnResume[Location] = Field(
        "", description="for copies of remote shards, and indexes; none: in $TMPDIR"
    )
    cache_gib: OnResume[float] = Field(64.0, description="of a node's disk that cache_directory may take", gt=0)
    window_shards: int = Field(8, description="samples are shuffled within windows of this many shards", ge=1)
    crop_min_area: PerStage[float] = Field(
        0.9, description="random crops keep at least this share of the image", gt=0, le=1
    )
    max_bad_ratio: OnResume[float] = Field(
        0.01, description="stop if more than this share of samples is unusable", ge=0, le=1
    )

    @model_validator(mode="after")
    def _sets_to_mix(self) -> DataSection:
        if isinstance(self.train, tuple):
            paths = [os.path.normpath(source.path) for source in self.train]
            if not paths or len(set(paths)) < len(paths):
                raise ValueError("train needs one directory or more, each once")
            if len({source.weight is None for source in self.train}) > 1:
                raise ValueError(
                    "give a weight to every set of train or to none: then each sample comes once per epoch"
                )
        return self

    @model_validator(mode="after")
    def _balance_of_each_set(self) -> DataSection:
        num_sets = len(self.train) if isinstance(self.train, tuple) else 1
        if self.balances and len(self.balances) != num_sets:
            raise ValueError(
                f"train has {num_sets} sets, balance {len(self.balances)}: give a list with a folder, or none, for each"
            )
        if self.balances and self.sampling == "with_replacement":
            raise ValueError("a balance says how often each sample comes: take sampling without_replacement")
        return self

    @property
    def balances(self) -> tuple[str, ...]:
        """The folder of each set, "" for one that is read whole; empty where there is no balance."""
        folders = (self.balance,) if isinstance(self.balance, str) else self.balance
        folders = tuple("" if folder == "none" else folder for folder in folders)
        return folders if any(folders) else ()


class TextMaskingSection(Section):
    """What is left of long captions (docs/text_masking.md)."""

    strategy: PerStage[Literal["none", "truncate", "random", "block", "frequency"]] = Field(
        "none", description="none | truncate | random | block | frequency"
    )
    max_tokens: PerStage[int | None] = Field(
        None, description="longer captions are cut to this, start and end included; none: context length", gt=2
    )
    frequency_threshold: PerStage[float] = Field(
        1e-6, description="share of all words up to which a word is rare", gt=0
    )
    word_counts: OnResume[Location] = Field(
        "", description="words.json of `data-prep words`, any fsspec URL (frequency)"
    )

    @model_validator(mode="after")
    def _counts_for_frequency(self) -> TextMaskingSection:
        if self.strategy == "frequency" and not self.word_counts:
            raise ValueError("strategy frequency needs word_counts=FILE, made by `data-prep words`")
        return self


class ConceptsSection(Section):
    """Words of the captions, taught in stages (docs/concepts.md)."""

    file: OnResume[Location] = Field("", description="concepts.jsonl of `data-prep concepts`, any fsspec URL")
    objective: PerStage[Literal["none", "predict", "keep", "mlm"]] = Field(
        "none",
        description="none | predict: a caption's concepts, from the picture | keep: which words of long captions stay "
        "| mlm: masked words, by the text tower alone",
    )
    curriculum: CurriculumKind = Field(
        "concepts", description="what rises by stages of mlm: concepts | none | length | rarity | masking_ratio"
    )
    weight: PerStage[float] = Field(1.0, description="of the loss of predict, beside that of pairs", gt=0)
    boundaries: tuple[int, ...] = Field(
        (), description="samples seen after which stages 2, 3, … begin; none: all stages at once"
    )

    @property
    def teaches_words(self) -> bool:
        """Whether the curriculum is one of any words, which needs no file of concepts."""
        return self.objective == "mlm" and self.curriculum in ("none", "length", "masking_ratio")

    @model_validator(mode="after")
    def _ascending(self) -> ConceptsSection:
        if list(self.boundaries) != sorted({*self.boundaries}) or min(self.boundaries, default=1) < 1:
            raise ValueError(f"boundaries are samples seen, ascending and above 0 (got {list(self.boundaries)})")
        return self


class LossSection(Section):
    """What image and text features are trained for, and how ranks share it (docs/loss.md)."""

    kind: LossKind = Field("info_nce", description="info_nce: CLIP's softmax | sigmoid: SigLIP's, with a bias")
    exchange: PerStage[OnResume[Literal["gather", "ring"]]] = Field(
        "gather", description="gather: each rank holds all image features | ring: one rank's at a time"
    )
    kernel: PerStage[OnResume[Kernel]] = Field(
        "auto", description="auto: triton's fused one on CUDA, else torch's | torch | triton"
    )
    tile_size: PerStage[OnResume[int]] = Field(
        1024, description="torch's kernel computes so many rows and columns at a time", ge=16
    )
    cache_gradients: PerStage[bool] = Field(
        False,
        description="negatives from all micro-batches of a step, for a second forward pass (GradCache)",
    )


class OptimizerSection(Section):
    """Warm-up and cosine decay; no weight decay of biases, norms and the temperature (docs/training.md)."""

    name: Literal["adamw", "muon", "deepspeed_adamw"] = Field(
        "adamw", description="adamw | muon (matrices of blocks; AdamW else) | deepspeed_adamw (compiled at first start)"
    )
    lr: float = Field(5e-4, description="peak learning rate", gt=0, le=100)
    final_lr_ratio: float = Field(0.0, description="learning rate at the end as a share of the peak", ge=0, le=1)
    warmup_steps: int = Field(2000, description="steps of linear warm-up", ge=0)
    weight_decay: float = Field(0.2, description="decoupled weight decay of matrices", ge=0)
    decay_embeddings: bool = Field(False, description="embeddings of tokens and positions decay too, as open_clip's do")
    beta1: float = Field(0.9, description="decay of the first moment", ge=0, lt=1)
    beta2: float = Field(0.98, description="decay of the second moment", ge=0, lt=1)
    eps: float = Field(1e-6, description="added to the root of the second moment", gt=0)
    muon_momentum: float = Field(0.95, description="decay of Muon's momentum", ge=0, lt=1)
    image_lr_ratio: float = Field(1.0, description="image tower's learning rate as a share of lr; 0 freezes it", ge=0)
    text_lr_ratio: float = Field(1.0, description="text tower's learning rate as a share of lr; 0 freezes it", ge=0)
    layer_decay: float = Field(1.0, description="each block's learning rate as a share of the next one's", gt=0, le=1)
    ema_decay: float | None = Field(
        None, description="per step, of an average of the weights that is saved as well; none: no average", gt=0, lt=1
    )
    max_grad_norm: float = Field(1.0, description="gradients are clipped to this norm; 0: not at all", ge=0)


class TrainSection(Section):
    """How long, how much at once, where to."""

    output: OnResume[Location] = Field("", description="run directory: recipe, metrics, checkpoints")
    epochs: PerStage[float] = Field(32.0, description="passes over the data", gt=0)
    max_steps: PerStage[int | None] = Field(None, description="stop after this many steps; none: as epochs say", gt=0)
    # ranks may be others on a resume: the steps go on from the number of samples
    global_batch_size: PerStage[OnResume[int]] = Field(
        2048, description="pairs per optimiser step, all ranks together", gt=0
    )
    micro_batch_size: PerStage[OnResume[int]] = Field(256, description="pairs per forward pass of one rank", gt=0)
    seed: int = Field(0, description="of initial weights, sample order, crops and masks", ge=0, lt=2**63)
    deepspeed_config: OnResume[Location] = Field("zero1_bf16", description="template in ds_configs/ (name) or a path")
    precision: OnResume[Precision | None] = Field(
        None, description="bf16 | fp16 | autocast | fp32, over the template's own (ds_configs/README.md)"
    )
    activation_checkpointing: PerStage[OnResume[bool]] = Field(
        False, description="recompute blocks backward: less memory, more time"
    )
    compile: PerStage[bool] = Field(False, description="torch.compile the transformer blocks")
    log_every_steps: PerStage[OnResume[int]] = Field(10, description="steps between lines of metrics.jsonl", gt=0)
    save_every_steps: PerStage[OnResume[int]] = Field(
        1000, description="steps between checkpoints; the last step always saves", gt=0
    )
    save_every_minutes: PerStage[OnResume[float | None]] = Field(
        None, description="save also when this long nothing was saved", gt=0
    )
    keep_checkpoints: OnResume[int] = Field(2, description="older checkpoints are deleted; at least 1", ge=1)
    keep_every_steps: OnResume[int | None] = Field(
        None, description="keep a checkpoint of each so many steps for good", gt=0
    )
    resume: OnResume[Location] = Field(
        "auto", description="auto | never | a run or checkpoint to go on from (docs/reliability.md)"
    )


class FaultsSection(Section):
    """What a run does when something goes wrong (docs/reliability.md)."""

    on_non_finite: Literal["skip", "roll_back", "stop"] = Field(
        "skip", description="loss or gradients not finite; no rank applies them: skip | roll_back | stop"
    )
    max_skipped_steps: int = Field(10, description="stop if more steps are skipped", ge=0)
    skip_window_steps: int = Field(1000, description="within so many steps", gt=0)
    on_spike: Literal["warn", "roll_back", "stop"] = Field(
        "warn", description="a loss far above those before: warn | roll_back | stop"
    )
    spike_deviations: float = Field(10.0, description="far above: median plus so many robust deviations", gt=0)
    spike_window_steps: int = Field(200, description="of the losses of so many steps", ge=4)
    max_roll_backs: int = Field(3, description="a stage goes back to a checkpoint so often, then stops", ge=0)
    compare_ranks_every_steps: int = Field(
        100, description="steps after which weights are compared between ranks; not with ZeRO stage 3", gt=0
    )
    hang_timeout_s: float = Field(
        600.0, description="without a step for so long, stacks of all ranks are written and the run ends", gt=0
    )


class LogSection(Section):
    """What a run tells of itself beside metrics.jsonl and TensorBoard (docs/observability.md)."""

    watch_steps: bool = Field(True, description="norms, phases and accuracy within the batch at each logged step")
    profile_steps: tuple[int, int] | None = Field(None, description="[first, last]: trace these steps into profile/")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases: off | offline | online")
    wandb_project: str = Field("cluster-clip", description="project there; the run is called as its directory")

    @model_validator(mode="after")
    def _ordered(self) -> LogSection:
        if self.profile_steps is not None and not 0 < self.profile_steps[0] <= self.profile_steps[1]:
            raise ValueError("profile_steps are [first, last], counted from 1")
        return self


class EvaluationSection(Section):
    """Evaluation of the weights during training (docs/observability.md)."""

    data: tuple[Location, ...] = Field((), description="evaluation sets; none: no evaluation")
    every_steps: int = Field(1000, description="steps between evaluations", gt=0)
    batch_size: int = Field(64, description="images or texts at once on a rank", gt=0)
    workers: int = Field(2, description="threads per rank that decode", gt=0)


class Recipe(Section):
    """All options of a run."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    masking: PerStage[MaskingConfig] = MaskingConfig()
    text_masking: TextMaskingSection = TextMaskingSection()
    concepts: ConceptsSection = ConceptsSection()
    loss: LossSection = LossSection()
    optimizer: PerStage[OptimizerSection] = OptimizerSection()
    train: TrainSection = TrainSection()
    faults: OnResume[FaultsSection] = FaultsSection()
    log: OnResume[LogSection] = LogSection()
    evaluation: OnResume[EvaluationSection] = EvaluationSection()
    stages: tuple[dict[str, Any], ...] = ()

    def by_stage(self) -> list[tuple[str | None, Recipe]]:
        """(name, recipe) of each stage in order (docs/training.md); without stages the recipe itself, nameless."""
        merged = merge_stages(self.model_dump(), self.stages, options_of(Recipe))
        return [(name, Recipe.model_validate(fields)) for name, fields in merged] or [(None, self)]

    @model_validator(mode="after")
    def _one_way_to_cut_captions(self) -> Recipe:
        if self.concepts.objective == "keep" and (
            self.text_masking.strategy != "none" or self.text_masking.max_tokens is None
        ):
            raise ValueError(
                "concepts.objective keep says itself what is left of long captions: give text_masking.max_tokens, and "
                "text_masking.strategy none"
            )
        return self

    @model_validator(mode="after")
    def _whole_words_to_mask(self) -> Recipe:
        if self.masks_words and self.text_masking.strategy not in ("none", "truncate"):
            raise ValueError(
                f"concepts.objective mlm masks whole words, and text_masking.strategy {self.text_masking.strategy} "
                "leaves parts of captions: take none or truncate"
            )
        return self

    @property
    def masks_words(self) -> bool:
        """Whether the text tower alone is trained, on captions with masked words."""
        return self.concepts.objective == "mlm"

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
        if self.loss.kind == "sigmoid":
            fields |= {"init_logit_scale": _SIGMOID_LOGIT_SCALE, "init_logit_bias": _SIGMOID_LOGIT_BIAS}
        fields["text"] |= {"attention": self.model.text_attention, "pool": self.model.text_pool}
        if self.masks_words:  # a masked word follows from what is before it and behind it
            fields["text"]["attention"] = "bidirectional"
        fields["text"]["context_length"] = self.context_length
        fields["text"] |= {"vocab_size": vocab_size, "eot_token_id": eot_token_id}
        try:
            return CLIPConfig.from_dict(fields)
        except ValueError as error:
            raise UserError(f"recipe: model {self.model.name}: {error}") from error

    @property
    def context_length(self) -> int:
        """Longest caption in tokens that the model could take."""
        return self.model.context_length or config_from_name(self.model.name).text.context_length

    @property
    def longest_caption(self) -> int:
        """In tokens, of those that are trained on: longer ones are cut."""
        is_cut = self.text_masking.strategy != "none" or self.concepts.objective == "keep"
        return (self.text_masking.max_tokens if is_cut else None) or self.context_length
