"""Steps of a stage whose tensors and collectives are counted, on a CPU; nothing is saved."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.data_loader import Batch
from pipeline.planning.measurement import CollectiveVolume, TensorMemory
from pipeline.ranks import Ranks
from pipeline.training.engines.engine import make_engine, release
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.objectives.objective import make_objective
from pipeline.training.stage_plan import Stage
from pipeline.training.train_step import train_step
from pipeline.training.weights.stage_model import make_model, speed_up


@dataclass(frozen=True)
class Trial:
    """What one rank's last step took.

    weight_bytes, resting_bytes, peak_bytes: of the model's parameters, of all tensors between steps, and at most in a
    step, one micro-batch of images and captions included
    payload_bytes, calls: by collective
    setup_s, step_s: of model and engine, and of the step
    """

    weight_bytes: int
    resting_bytes: int
    peak_bytes: int
    payload_bytes: Counter[str]
    calls: Counter[str]
    setup_s: float
    step_s: float


def try_steps(stage: Stage, config: dict[str, Any], ranks: Ranks, steps: Sequence[Sequence[Batch]]) -> Trial:
    """Make the stage's model and engine and take steps with these micro-batches; the figures are the last one's.

    Two steps at least: optimizer states appear in the first, in which DeepSpeed also learns what stage 3 needs when.
    """
    start_s = time.perf_counter()
    with TensorMemory() as memory:
        clip = make_model(stage, None, ranks.device)
        speed_up(clip, stage)
        engine = make_engine(clip, stage.recipe, config, ranks)
        masks = MaskDrawer(stage.masking, clip.visual, stage.model.vision.patch_size, stage.seed, ranks)
        objective = make_objective(stage.recipe.loss, ranks)
        setup_s = time.perf_counter() - start_s
        for step, micro_batches in enumerate(steps, start=stage.first_step):
            memory.mark("rest")
            start_s = time.perf_counter()
            with CollectiveVolume() as volume:
                train_step(engine, micro_batches, masks, objective, ranks, step, stage.progress(step))
            step_s = time.perf_counter() - start_s
            memory.mark("step")
    weight_bytes = sum(parameter.nbytes for parameter in clip.parameters())
    del masks, objective
    release(engine)
    resting, stepped = [mark for mark in memory.marks if mark.name in ("rest", "step")][-2:]
    return Trial(
        weight_bytes,
        resting.live_bytes,
        stepped.peak_bytes + _bytes(steps[-1][0]),
        volume.payload_bytes,
        volume.calls,
        setup_s,
        step_s,
    )


def _bytes(batch: Batch) -> int:
    return batch.images_BCHW.nbytes + batch.tokens_N.nbytes + batch.cu_seqlens_B1.nbytes
