"""One training step: a batch becomes masked images and packed captions, features, a loss, and new weights.

Or captions with masked words (word_step.py).

B pairs of this rank, L patches of an image
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.clip import CLIP, CLIPOutput
from model.heads import NamedConcepts
from model.masked_words import MaskedWordCLIP
from model.masking import Masks, PatchedImages
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.engines.engine import Engine, make_engine
from pipeline.training.engines.engine_config import precision_of
from pipeline.training.engines.weight_average import WeightAverage
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.observing.step_observer import StepObserver
from pipeline.training.stage_plan import Stage
from pipeline.training.step_loss import StepLoss, make_step_loss
from pipeline.training.step_report import Part, StepReport
from pipeline.training.weights.stage_model import speed_up
from pipeline.training.word_step import word_parts


@dataclass(frozen=True)
class Learner:
    """What the steps of a stage work with: what is trained, and what becomes of a batch until there is a loss."""

    engine: Engine
    masks: MaskDrawer
    loss: StepLoss
    max_grad_norm: float
    average: WeightAverage | None
    ranks: Ranks
    concept_weight: float = 1.0


def make_learner(stage: Stage, clip: CLIP, config: dict[str, Any], ranks: Ranks) -> Learner:
    """Give the stage's model to DeepSpeed, with all that belongs to it."""
    speed_up(clip, stage, precision_of(config))
    section = stage.recipe.optimizer
    engine = make_engine(clip, stage.recipe, config, ranks)
    patch_size, decay = stage.model.vision.patch_size, section.ema_decay
    masks = MaskDrawer(stage.masking, clip.visual, patch_size, stage.seed, ranks, engine.precision)
    average = None if decay is None else WeightAverage(engine, decay, stage.first_step, ranks)
    return Learner(
        engine=engine,
        masks=masks,
        loss=make_step_loss(stage.recipe.loss, ranks),
        max_grad_norm=section.max_grad_norm,
        average=average,
        ranks=ranks,
        concept_weight=stage.recipe.concepts.weight,
    )


class Encoded(NamedTuple):
    """A micro-batch on the device, the patches chosen of its images, and the features of both towers."""

    batch: Batch
    images: PatchedImages
    chosen: Masks
    output: CLIPOutput


def train_step(
    learner: Learner,
    micro_batches: Sequence[Batch],
    step: int,
    progress: float,
    num_taught: int = 0,
    observer: StepObserver | None = None,
) -> StepReport:
    """Accumulate the micro-batches' gradients and update the weights, or nothing where a gradient is not finite.

    step: counted from 0 over the run
    progress: through the stage, from 0 at the first step to 1 at the last
    num_taught: concepts that are to be predicted, where the batches have them
    observer: measures the step, if somebody asks; made before its batches are fetched
    """
    engine, masks = learner.engine, learner.masks
    ended = observer.end if observer else _nobody_asks
    ended("data")
    if isinstance(engine.module, MaskedWordCLIP):
        parts = word_parts(engine, micro_batches, learner.ranks, ended)
    else:
        parts = _pair_parts(learner, micro_batches, step, progress, num_taught, ended)
    means, finite = [], []
    for part in parts:
        ended("loss")
        engine.backward(spread_non_finite(part.loss))
        ended("backward")
        means.append(part.means_R)
        finite.append(part.finite_B)
        if observer and part.output:
            observer.see_features(part.output)

    grad_norm = engine.gradient_norm()  # of all ranks: where one has a loss or gradient that is not finite, nor is this
    skipped = (~grad_norm.isfinite()).float()
    divide_by = (grad_norm / learner.max_grad_norm).clamp(min=1.0) if learner.max_grad_norm else None
    if observer:
        observer.before_update(engine)
    engine.update(divide_by, skipped)
    if observer:
        observer.after_update()
    if learner.average:
        learner.average.update(step)
    masks.update_copy()
    ended("update")
    return StepReport(torch.stack(means).mean(dim=0), grad_norm, skipped, torch.cat(finite))


def _pair_parts(
    learner: Learner,
    micro_batches: Sequence[Batch],
    step: int,
    progress: float,
    num_taught: int,
    ended: Callable[[str], None],
) -> Iterator[Part]:
    """Every micro-batch of pairs, encoded, with its loss. Collective."""

    def encode(number: int, with_heads: bool) -> Encoded:
        batch = micro_batches[number].to(learner.ranks.device)
        images, chosen = learner.masks.draw(batch.images_BCHW, step, number, progress)
        patches_KP = images.gather(chosen.selection.kept_K)
        ended("masks")
        named = NamedConcepts(batch.concepts, num_taught) if batch.concepts and with_heads else None
        output: CLIPOutput = learner.engine(patches_KP, chosen.selection, batch.text, chosen.visible_BT, named)
        ended("forward")
        return Encoded(batch, images, chosen, output)

    loss_of = learner.loss.begin(lambda number: encode(number, with_heads=False).output, len(micro_batches))
    for number in range(len(micro_batches)):
        encoded = encode(number, with_heads=True)
        loss, concepts = loss_of(number, encoded.output), encoded.output.concepts
        whole_loss = loss if concepts is None else loss + learner.concept_weight * concepts.loss
        yield Part(whole_loss, _means(loss, encoded), _finite(encoded.output), encoded.output)


def _nobody_asks(phase: str) -> None:
    """Where no observer wants to know how long a phase took."""


def spread_non_finite(loss: Tensor) -> Tensor:
    """The loss itself, to be differentiated: where it is not finite all its gradients are NaN, otherwise unchanged."""
    return loss + 0 * loss.detach() * loss


@torch.no_grad()
def _means(loss: Tensor, encoded: Encoded) -> Tensor:
    batch, images, chosen, output = encoded
    kept_B = chosen.selection.cu_seqlens_B1.diff()
    masked_share_B = 1 - kept_B / images.num_patches
    image_tokens = chosen.selection.kept_K.numel() + kept_B.numel()
    return torch.stack(
        [
            loss.detach(),
            output.logit_scale.detach().squeeze(0),
            masked_share_B.mean(),
            masked_share_B.std(correction=0),
            chosen.threshold,
            chosen.flat_share,
            torch.full_like(loss, image_tokens),
            torch.full_like(loss, batch.tokens_N.numel()),
            *(value.detach() for value in output.concepts or ()),
        ]
    )


@torch.no_grad()
def _finite(output: CLIPOutput) -> Tensor:
    return (output.image_features.sum(-1) + output.text_features.sum(-1)).isfinite()
