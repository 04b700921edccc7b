"""The planner's closed forms beside counts: every allocation and every collective of real steps on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from forked_ranks import run_ranks

from model.clip import CLIP
from model.config import config_from_name
from model.heads import Labels
from model.masked_words import MaskedWords
from model.packing import keep_all, lengths_to_cu_seqlens, pack_tokens
from pipeline.data.data_loader import Batch
from pipeline.planning.measurement import Trial, try_steps
from pipeline.planning.memory import estimate_memory, text_memory, vision_memory
from pipeline.planning.step_time import step_traffic
from pipeline.planning.workload import Workload, workload_of
from pipeline.ranks import Ranks
from pipeline.recipe_files import load_recipe
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.stage_plan import plan_stages

CAPTION_TOKENS = 12


TOLERANCE = 0.09
# Gloo's threads may hold on to what they averaged last: 7 % of the smallest peaks here, more on a busy machine.
GLOO_TOLERANCE = 0.25


class Case(NamedTuple):
    """Options of a run; `wide`: gradients of micro-batches and ranks add up in fp32."""

    zero_stage: int
    precision: str
    accumulation: int
    options: tuple[str, ...] = ()
    wide: bool = False


WORDS = ("concepts.objective=mlm", "concepts.curriculum=none")
CASES = [
    Case(0, "fp32", 1),
    Case(1, "bf16", 2),
    Case(2, "bf16", 2),
    Case(3, "bf16", 2),
    Case(1, "fp32", 1, ("train.activation_checkpointing=true",)),
    Case(1, "fp32", 2, ("loss.cache_gradients=true",)),
    Case(1, "fp32", 1, ("loss.exchange=ring",)),
    Case(1, "bf16", 1, ("optimizer.image_lr_ratio=0",)),
    Case(1, "bf16", 2, WORDS),
    Case(3, "fp32", 1, WORDS),
    *(Case(stage, "bf16", 2, wide=True) for stage in (1, 2, 3)),
    Case(1, "autocast", 1),  # the last: DeepSpeed then sends gradients of engines to come in autocast's precision
]
WIDE = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def run_case(ranks: Ranks, case: Case, directory: Path) -> tuple[Workload, Trial]:
    template = directory / f"rank{ranks.rank}.json"
    zero = {"stage": case.zero_stage, "reduce_bucket_size": 2_000_000}
    template.write_text(json.dumps({"zero_optimization": zero} | (WIDE if case.wide else {})))
    pairs = 64
    recipe = load_recipe(
        "base",
        [
            "model.name=ViT-nano-8",
            "masking.strategy=random",
            f"train.precision={case.precision}",
            f"train.micro_batch_size={pairs}",
            f"train.global_batch_size={pairs * case.accumulation * ranks.world_size}",
            *case.options,
        ],
    )
    [stage] = plan_stages(recipe, 1_000_000, ranks.world_size, 2_000, 3)
    config = deepspeed_config(recipe, stage.batches, str(template))
    side = stage.model.vision.image_size
    words = None
    if stage.masks_words:
        side, count = 0, round(0.15 * pairs * CAPTION_TOKENS)
        labels = Labels(torch.arange(count), torch.arange(count + 1, dtype=torch.int32))
        words = MaskedWords(torch.arange(count), labels)
    batch = Batch(
        torch.randint(0, 256, (pairs, 3, side, side), dtype=torch.uint8),
        torch.randint(4, 2_000, (pairs * CAPTION_TOKENS,)),
        lengths_to_cu_seqlens(torch.full((pairs,), CAPTION_TOKENS)),
        CAPTION_TOKENS,
        [],
        [""] * pairs,
        words=words,
    )
    load = workload_of(stage, config, CAPTION_TOKENS, on_gpu=False)
    return load, try_steps(stage, config, ranks, [[batch] * case.accumulation] * 2)


def run_cases(ranks: Ranks, directory: Path) -> list[tuple[Workload, Trial]]:
    return [run_case(ranks, case, directory) for case in CASES]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, tuple[Workload, Trial]]:
    [found, _] = run_ranks(run_cases, 2, tmp_path_factory.mktemp("plans"))
    return dict(zip(CASES, found, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_peak_memory_is_as_estimated(case: Case, measured: dict[Case, tuple[Workload, Trial]]) -> None:
    load, trial = measured[case]
    estimated = estimate_memory(load, on_gpu=False).tensor_bytes
    assert (1 - TOLERANCE) * estimated <= trial.peak_bytes <= (1 + GLOO_TOLERANCE) * estimated


@pytest.mark.parametrize("case", CASES, ids=str)
def test_collectives_carry_what_is_estimated(case: Case, measured: dict[Case, tuple[Workload, Trial]]) -> None:
    load, trial = measured[case]
    estimated: dict[str, int] = {}
    for traffic in step_traffic(load):
        estimated[traffic.operation] = estimated.get(traffic.operation, 0) + traffic.payload_bytes
    # the norm, whether to go on, DeepSpeed's padding: a few numbers
    assert set(trial.payload_bytes) - set(estimated) <= {"all_reduce", "broadcast"}
    for operation in {*estimated, *trial.payload_bytes}:
        assert trial.payload_bytes[operation] == pytest.approx(estimated.get(operation, 0), rel=1e-3, abs=10_000)


def test_activations_are_what_autograd_saves() -> None:
    """Both towers alone, each storage once, against saved-tensor hooks."""
    batch = ["train.micro_batch_size=16", "train.global_batch_size=16"]
    recipe = load_recipe("base", ["model.name=ViT-tiny-8", "masking.strategy=none", "train.precision=fp32", *batch])
    [stage] = plan_stages(recipe, 1_000, 1, 49408, 49407)
    load = workload_of(stage, deepspeed_config(recipe, stage.batches, "zero1_fp32"), CAPTION_TOKENS, on_gpu=False)
    clip = CLIP(config_from_name("ViT-tiny-8"))
    weights = {parameter.untyped_storage().data_ptr() for parameter in clip.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        images = clip.visual(torch.randn(16 * 64, 192), keep_all(16, 64, torch.device("cpu")))
        image_bytes = sum(saved.values())
        saved.clear()
        lengths_B = torch.full((16,), CAPTION_TOKENS)
        text = pack_tokens(torch.randint(0, 99, (16 * CAPTION_TOKENS,)), lengths_to_cu_seqlens(lengths_B), 77)
        captions = clip.text(text)
    assert images.shape == captions.shape
    assert vision_memory(load).saved == pytest.approx(image_bytes, rel=0.01)
    assert text_memory(load).saved == pytest.approx(sum(saved.values()), rel=0.02)
