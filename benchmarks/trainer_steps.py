"""Steps as `pipeline/train.py` takes them: its recipe, its engine, its `train_step`, on a fixed batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from training_steps import END_TOKEN, Step, TrainingBatch

from model.packing import PIXEL_MEAN, PIXEL_STD, lengths_to_cu_seqlens
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.stage_plan import Stage, plan_stages
from pipeline.training.train_step import Learner, make_learner, train_step
from pipeline.training.weights.stage_model import make_model

_VOCABULARY = 49408


def make_stage(name: str, pairs: int, strategy: str, options: Sequence[str] = ()) -> Stage:
    """The base recipe's stage with this model and batch on one device."""
    batches = [f"train.global_batch_size={pairs}", f"train.micro_batch_size={pairs}"]
    recipe = load_recipe("base", [f"model.name={name}", f"masking.strategy={strategy}", *batches, *options])
    (stage,) = plan_stages(recipe, 1000 * pairs, 1, _VOCABULARY, END_TOKEN)
    return stage


def learner_of(stage: Stage, ranks: Ranks) -> Learner:
    """The stage's model in the engine that training gives it."""
    config = deepspeed_config(stage.recipe, stage.batches, stage.recipe.train.deepspeed_config)
    return make_learner(stage, make_model(stage, None, ranks.device), config, ranks)


def as_loaded(batch: TrainingBatch) -> Batch:
    """The batch as the loader would give it: bytes of pixels, packed captions."""
    batch = batch.to(torch.device("cpu"))
    means, deviations = (torch.tensor(values)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    pixels_BCHW = ((batch.images_BCHW * deviations + means) * 255).clamp(0, 255).to(torch.uint8)
    is_token_BT = torch.arange(batch.tokens_BT.shape[1]) < batch.lengths_B[:, None]
    longest = int(batch.lengths_B.max())
    tokens_N, cu_seqlens_B1 = batch.tokens_BT[is_token_BT], lengths_to_cu_seqlens(batch.lengths_B)
    loaded = Batch(pixels_BCHW, tokens_N, cu_seqlens_B1, longest, [], [])
    return loaded.pin_memory() if torch.cuda.is_available() else loaded


def trainer_step(learner: Learner, batch: TrainingBatch) -> Step:
    """One whole step of training, its copies to the device included."""
    loaded = as_loaded(batch)

    def step() -> None:
        train_step(learner, [loaded], step=1, progress=0.0)

    return step
