"""What a run will do, before it does anything: its stages, their batches and steps, and what they cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.config import CLIPConfig
from model.flops import step_flops
from model.masking import MaskingConfig
from pipeline.data.sample_order import BatchPlan
from pipeline.errors import UserError
from pipeline.recipe import Recipe

# The length of captions is known once they are read; where stages are compared, all have this many tokens.
_CAPTION_TOKENS = 16


@dataclass(frozen=True)
class Stage:
    """One stage of a run; steps, samples and epochs count from the beginning of the run.

    name: None where the recipe has no stages and the run is one
    end_step: the first step that is no longer this stage's
    first_pass: passes over the data before this stage
    """

    name: str | None
    recipe: Recipe
    model: CLIPConfig
    batches: BatchPlan
    end_step: int
    first_sample: int
    first_pass: float

    @property
    def first_step(self) -> int:
        """The step with which this stage begins."""
        return self.batches.first_step

    @property
    def num_steps(self) -> int:
        """Optimiser steps of this stage."""
        return self.end_step - self.first_step

    @property
    def num_samples(self) -> int:
        """Pairs that this stage trains on, repetitions counted."""
        return self.num_steps * self.batches.global_batch_size

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.recipe.train.seed

    @property
    def masking(self) -> MaskingConfig:
        """Which patches this stage drops."""
        return self.recipe.masking.to_config()

    @property
    def patches_kept(self) -> float:
        """Patches of an image that are encoded, on average over the stage."""
        return kept_share(self.masking) * self.model.vision.num_patches

    @property
    def flops(self) -> int:
        """Operations of the stage, about: for captions of 16 tokens, without the loss."""
        text = self.recipe.text_masking
        longest = None if text.strategy == "none" else text.max_tokens
        caption_tokens = min(_CAPTION_TOKENS, longest or self.recipe.context_length)
        return self.num_samples * step_flops(self.model, [round(self.patches_kept)], [caption_tokens])

    def progress(self, step: int) -> float:
        """How far through this stage a step is: 0 at the first, 1 at the last."""
        return (step - self.first_step) / max(1, self.num_steps - 1)

    def passes(self, step: int) -> float:
        """Passes over the data that the first `step` steps of the run make."""
        return self.first_pass + (step - self.first_step) / self.batches.steps_per_epoch

    def samples(self, step: int) -> int:
        """Pairs seen in the first `step` steps of the run."""
        return self.first_sample + (step - self.first_step) * self.batches.global_batch_size


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
    recipe: Recipe, num_samples: int, world_size: int, vocab_size: int, eot_token_id: int
) -> tuple[Stage, ...]:
    """All stages of a run, one after the other; raises UserError that names the first stage that cannot work.

    Every stage begins an epoch with a number of its own, so that no order of samples comes twice.
    """
    stages: list[Stage] = []
    step, epoch, sample, passes = 0, 0, 0, 0.0
    for name, stage_recipe in recipe.by_stage():
        try:
            batches = plan_batches(stage_recipe, num_samples, world_size)
            model = stage_recipe.clip_config(vocab_size, eot_token_id)
            _check_masking(stage_recipe.masking.to_config(), model.vision.num_patches)
        except UserError as error:
            raise UserError(f"stage {name}: {error}" if name else str(error)) from None
        train = stage_recipe.train
        steps = train.max_steps or max(1, round(train.epochs * batches.steps_per_epoch))
        batches = replace(batches, first_step=step, first_epoch=epoch)
        stages.append(Stage(name, stage_recipe, model, batches, step + steps, sample, passes))
        step += steps
        epoch += math.ceil(steps / batches.steps_per_epoch)
        sample += stages[-1].num_samples
        passes += steps / batches.steps_per_epoch
    return tuple(stages)


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
    return current.end_step - step + later / (current.flops / current.num_steps)


def kept_share(masking: MaskingConfig) -> float:
    """Share of patches that are encoded, on average over a stage."""
    match masking.strategy:
        case "none":
            return 1.0
        case "cluster-reference":
            return 1 - masking.min_mask_ratio  # at most: what it drops is seldom bounded by its threshold
        case _:
            # linear and cosine schedules both pass through the middle in the middle
            return 1 - (masking.mask_ratio(0) + masking.mask_ratio(1)) / 2


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
        facts = [_describe_images(stage), _describe_batch(stage.batches), _describe_steps(stage, num_shards)]
        lines += [f"  {fact}" for fact in facts] if stage.name is not None else facts
    return "\n".join(lines)


def _describe_images(stage: Stage) -> str:
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


def _describe_batch(plan: BatchPlan) -> str:
    return (
        f"batch: {plan.global_batch_size:,} = {plan.micro_batch_size:,} micro x {plan.accumulation_steps} "
        f"accumulation x {plan.world_size} ranks; each pair meets "
        f"{plan.micro_batch_size * plan.world_size - 1:,} negatives"
    )


def _describe_steps(stage: Stage, num_shards: int) -> str:
    plan = stage.batches
    return (
        f"steps: {plan.num_samples:,} samples in {num_shards:,} shards = "
        f"{plan.steps_per_epoch:,} steps per epoch; {stage.num_steps:,} steps = "
        f"{stage.num_steps / plan.steps_per_epoch:.2f} epochs = {stage.num_samples:,} samples"
    )
