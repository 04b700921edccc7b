"""What a run will do, before it does anything: its stages, their batches and steps, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from formats.errors import UserError
from model.config import CLIPConfig
from model.flops import masked_word_flops, step_flops
from model.masking import MaskingConfig
from pipeline.data.curriculum import Curriculum, read_curriculum
from pipeline.data.data_loader import BATCHES_AHEAD
from pipeline.data.masked_words import MASKED_SHARE
from pipeline.data.sample_order import BatchPlan, Epochs, EqualEpochs
from pipeline.recipe import ConceptsSection, OptimizerSection, Recipe
from pipeline.training.progress import Progress, StageStart

# The length of captions is known once they are read; until then all have this many tokens, about as in CC12M or LAION.
CAPTION_TOKENS = 16
_AT_THE_START = Progress(0, 0)


@dataclass(frozen=True)
class Stage:
    """One stage of a run; steps, samples and epochs count from the beginning of the run.

    name: None where the recipe has no stages and the run is one
    starts: where this stage and those before it began
    first_position: of this stage in the stream of samples
    read_before: positions of the stream that the stages before it read
    epochs: where its epochs begin in that stream
    batches: what is left of the stage, from where the run stands
    planned_samples: at least so many are trained on, repetitions counted; the last batch is whole
    curriculum: the concepts that are taught, None where they have no use
    """

    name: str | None
    recipe: Recipe
    model: CLIPConfig
    starts: tuple[StageStart, ...]
    first_position: int
    read_before: tuple[range, ...]
    epochs: Epochs
    batches: BatchPlan
    planned_samples: int
    curriculum: Curriculum | None = None

    @property
    def first_step(self) -> int:
        """The step with which this stage begins."""
        return self.starts[-1].step

    @property
    def end_step(self) -> int:
        """The first step that is no longer this stage's."""
        left = self.first_position + self.planned_samples - self.batches.first_position
        return self.batches.first_step + max(0, _ceil_div(left, self.batches.global_batch_size))

    @property
    def num_steps(self) -> int:
        """Optimiser steps of this stage."""
        return self.end_step - self.first_step

    @property
    def num_samples(self) -> int:
        """Pairs that this stage trains on, repetitions counted."""
        return self.samples(self.end_step) - self.starts[-1].samples_seen

    @property
    def pairs_at_once(self) -> int:
        """Pairs that the loss compares with each other: of all ranks' micro-batches, or of the whole batch."""
        if self.recipe.loss.cache_gradients:
            return self.batches.global_batch_size
        return self.batches.global_batch_size // self.batches.accumulation_steps

    @property
    def samples_ahead(self) -> int:
        """How far the loader processes may be ahead of the step, all ranks together."""
        return (
            max(1, self.recipe.data.workers) * BATCHES_AHEAD * self.batches.micro_batch_size * self.batches.world_size
        )

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.recipe.train.seed

    @property
    def masks_words(self) -> bool:
        """Whether it reads captions alone and predicts masked words of them."""
        return self.recipe.masks_words

    @property
    def masking(self) -> MaskingConfig:
        """Which patches this stage drops."""
        return MaskingConfig(strategy="none") if self.masks_words else self.recipe.masking

    @property
    def patches_kept(self) -> float:
        """Patches of an image that are encoded, on average over the stage."""
        return self.masking.kept_share * self.model.vision.num_patches

    @property
    def flops(self) -> int:
        """Operations of the stage, about: for captions of 16 tokens, without the loss."""
        return self._flops(self.num_samples)

    @property
    def step_flops(self) -> int:
        """Operations of one step, about."""
        return self._flops(self.batches.global_batch_size)

    def _flops(self, num_samples: int) -> int:
        caption_tokens = min(CAPTION_TOKENS, self.recipe.longest_caption)
        if self.masks_words:
            predicted = round(MASKED_SHARE * num_samples * caption_tokens)
            return masked_word_flops(self.model.text, [caption_tokens], 0) * num_samples + masked_word_flops(
                self.model.text, [], predicted
            )
        return num_samples * step_flops(self.model, [round(self.patches_kept)], [caption_tokens])

    @property
    def schedule_steps(self) -> int:
        """Steps that the stage would have if all its batches were as large as its first."""
        return _ceil_div(self.planned_samples, self.starts[-1].global_batch_size)

    def schedule_step(self, step: int) -> float:
        """Where schedules stand at a step, between 0 and `schedule_steps`: they follow samples, not steps.

        So they go on where they were if a run continues with another batch size.
        """
        return (self.batches.position(step) - self.first_position) / self.starts[-1].global_batch_size

    def learning_rate(self, step: int) -> float:
        """Of a step of the run, before the shares that groups of parameters have of it."""
        return learning_rate(self.schedule_step(step), self.schedule_steps, self.recipe.optimizer)

    def progress(self, step: int) -> float:
        """How far through this stage a step is: 0 at the first, 1 at the last."""
        return min(1.0, self.schedule_step(step) / max(1, self.schedule_steps - 1))

    def passes(self, step: int) -> float:
        """Passes over the data that the first `step` steps of the run make; as long as this stage's are on average."""
        return self.samples(step) / self.batches.num_samples

    def samples(self, step: int) -> int:
        """Pairs seen in the first `step` steps of the run."""
        return self.starts[-1].samples_seen + self.batches.position(step) - self.first_position

    def positions(self, step: int) -> tuple[range, ...]:
        """What the first `step` steps of the run read of the stream of samples."""
        return (*self.read_before, range(self.first_position, self.batches.position(step)))

    @property
    def num_predicted(self) -> int:
        """Concepts that a head predicts in the end."""
        is_asked = self.recipe.concepts.objective == "predict"
        return len(self.curriculum.concepts.concepts) if self.curriculum and is_asked else 0

    def num_taught(self, step: int) -> int:
        """Concepts of the curriculum's stages at a step."""
        return 0 if self.curriculum is None else self.curriculum.num_taught(self.samples(step))

    @property
    def own_positions(self) -> range:
        """What the whole stage reads of the stream of samples."""
        return range(self.first_position, self.batches.position(self.end_step))

    def reached(self, step: int) -> Progress:
        """What a checkpoint after the first `step` steps of the run says of it."""
        return Progress(step, self.samples(step), self.name, self.starts)

    def resumed(self, at: Progress | StageStart) -> Stage:
        """The same stage from where a run left it, in batches as the recipe has them now."""
        position = self.first_position + at.samples_seen - self.starts[-1].samples_seen
        return replace(self, batches=replace(self.batches, first_step=at.step, first_position=position))


def plan_batches(recipe: Recipe, num_samples: int, world_size: int) -> BatchPlan:
    """Check the batch arithmetic; raises UserError that shows it and what would fit."""
    micro, total = recipe.train.micro_batch_size, recipe.train.global_batch_size
    if total % (micro * world_size):
        raise UserError(
            f"train.global_batch_size {total} is not a multiple of micro_batch_size {micro} x {world_size} ranks "
            f"= {micro * world_size}: take {max(1, round(total / (micro * world_size))) * micro * world_size}, "
            "or another micro_batch_size"
        )
    if num_samples < total:
        raise UserError(
            f"{num_samples:,} samples do not fill one global batch of {total:,} ({world_size} ranks x "
            f"{total // world_size:,} each): use more data, or a train.global_batch_size of at most {num_samples:,}"
        )
    return BatchPlan(num_samples, total, micro, world_size)


def plan_stages(
    recipe: Recipe,
    samples: int | Callable[[Recipe], Epochs],
    world_size: int,
    vocab_size: int,
    eot_token_id: int,
    progress: Progress = _AT_THE_START,
    read: Callable[[ConceptsSection], Curriculum | None] = read_curriculum,
) -> tuple[Stage, ...]:
    """All stages of a run, one after the other, as they are once it got to `progress`.

    samples: of an epoch; or the epochs of a stage's recipe, as TrainingData knows them
    read: the concepts of a stage's recipe

    Every stage begins an epoch with a number of its own, so that no order of samples comes twice. Raises UserError that
    names the first stage that cannot work.
    """
    stages: list[Stage] = []
    step, samples_seen, epoch = 0, 0, 0
    for number, (name, stage_recipe) in enumerate(recipe.by_stage()):
        try:
            epochs = EqualEpochs(samples) if isinstance(samples, int) else samples(stage_recipe)
            batches = plan_batches(stage_recipe, epochs.num_samples, world_size)
            model = stage_recipe.clip_config(vocab_size, eot_token_id)
            _check_masking(stage_recipe.masking, model.vision.num_patches)
            curriculum = read(stage_recipe.concepts)
        except UserError as error:
            raise UserError(f"stage {name}: {error}" if name else str(error)) from None
        begun = progress.stage_starts[number:]
        start = begun[0] if begun else StageStart(step, samples_seen, batches.global_batch_size)
        planned_samples = _planned_samples(stage_recipe, epochs, epoch, start.global_batch_size)
        stage = Stage(
            name,
            stage_recipe,
            model,
            starts=(*stages[-1].starts, start) if stages else (start,),
            first_position=epochs.start(epoch),
            read_before=stages[-1].positions(step) if stages else (),
            epochs=epochs,
            batches=replace(batches, first_step=start.step, first_position=epochs.start(epoch)),
            planned_samples=planned_samples,
            curriculum=curriculum,
        )
        if begun:  # a stage that is over is resumed at its end, where the next one began
            stage = stage.resumed(begun[1] if len(begun) > 1 else progress)
        stages.append(stage)
        step, samples_seen = stage.end_step, stage.samples(stage.end_step)
        epoch = epochs.at(stage.own_positions[-1]) + 1
    return tuple(stages)


def _planned_samples(recipe: Recipe, epochs: Epochs, first_epoch: int, global_batch_size: int) -> int:
    train = recipe.train
    return train.max_steps * global_batch_size if train.max_steps else max(1, epochs.samples(first_epoch, train.epochs))


def _check_masking(masking: MaskingConfig, num_patches: int) -> None:
    if not masking.leaves_a_patch(num_patches):
        raise UserError(
            f"masking drops {max(masking.mask_ratio(0), masking.mask_ratio(1)):.4g} of the {num_patches} patches of an "
            "image, which leaves less than one: take a lower masking.target_mask_ratio (final_mask_ratio), or more "
            "patches"
        )


def stage_of(stages: Sequence[Stage], step: int) -> Stage:
    """The stage to which a checkpoint after `step` steps belongs: the one that took the last of them."""
    return next(stage for stage in stages if step <= stage.end_step)


def steps_left(stages: Sequence[Stage], step: int) -> float:
    """What is left of the run after `step` steps; a later stage's steps count by their operations, to estimate time."""
    current = stage_of(stages, step)
    later = sum(stage.flops for stage in stages if stage.first_step > current.first_step)
    return current.end_step - step + later / current.step_flops


def learning_rate(step: float, total_steps: int, section: OptimizerSection) -> float:
    """Linear warm-up to `lr`, then half a cosine down to `lr * final_lr_ratio` at the last step.

    Steps count from 0; where a run went on with other batches than it began with, they come in fractions.
    """
    if step < section.warmup_steps:
        return min(section.lr, section.lr * (step + 1) / section.warmup_steps)
    progress = (step - section.warmup_steps) / max(1, total_steps - 1 - section.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return section.lr * (section.final_lr_ratio + (1 - section.final_lr_ratio) * cosine)


def _ceil_div(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def describe_stages(stages: Sequence[Stage], num_shards: int) -> str:
    """The arithmetic of a run in lines: per stage its images, batches, steps and share of the cost."""
    total_flops = sum(stage.flops for stage in stages)
    lines = []
    for number, stage in enumerate(stages, start=1):
        if stage.name is not None:
            lines.append(
                f"stage {number} of {len(stages)}, {stage.name}: steps {stage.first_step + 1:,} to {stage.end_step:,}, "
                f"{stage.flops / total_flops:.1%} of the run's operations, learning rate {stage.recipe.optimizer.lr:g}"
            )
        facts = [_describe_images(stage), _describe_batch(stage), _describe_steps(stage, num_shards)]
        lines += [f"  {fact}" for fact in facts] if stage.name is not None else facts
    return "\n".join(lines)


def _describe_images(stage: Stage) -> str:
    if stage.masks_words:
        return f"captions alone: masked words are predicted, curriculum {stage.recipe.concepts.curriculum}"
    masking, vision = stage.masking, stage.model.vision
    dropped = ""
    if masking.strategy != "none":
        dropped = f" {masking.mask_ratio(0):.0%}"
    if dropped and masking.final_mask_ratio is not None:
        dropped += f" to {masking.final_mask_ratio:.0%}"
    return (
        f"images: {vision.image_size} px, masking {masking.strategy}{dropped}: {stage.patches_kept:,.1f} of "
        f"{vision.num_patches:,} patches are encoded"
    )


def _describe_batch(stage: Stage) -> str:
    plan = stage.batches
    first = stage.starts[-1].global_batch_size
    before = "" if first == plan.global_batch_size else f"; {first:,} pairs when the stage began"
    negatives = "" if stage.masks_words else f"; each pair meets {stage.pairs_at_once - 1:,} negatives"
    return (
        f"batch: {plan.global_batch_size:,} = {plan.micro_batch_size:,} micro x {plan.accumulation_steps} "
        f"accumulation x {plan.world_size} ranks{negatives}{before}"
    )


def _describe_steps(stage: Stage, num_shards: int) -> str:
    plan = stage.batches
    return (
        f"steps: {plan.num_samples:,} samples in {num_shards:,} shards = "
        f"{plan.steps_per_epoch:,.1f} steps per epoch; {stage.num_steps:,} steps = "
        f"{stage.num_samples / plan.num_samples:.2f} epochs = {stage.num_samples:,} samples"
    )
