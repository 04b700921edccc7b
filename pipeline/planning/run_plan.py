"""The plan of a whole run: its stages one after the other, what each needs, and what would suit the hardware better."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from formats.errors import UserError
from pipeline.data.curriculum import planned_curriculum
from pipeline.data.sample_order import Epochs
from pipeline.hardware import Accelerator, Interconnect, accelerator_of, find_accelerator
from pipeline.planning.memory import Memory, estimate_memory
from pipeline.planning.step_time import StepTime, Traffic, step_time, step_traffic
from pipeline.planning.workload import Workload, workload_of
from pipeline.recipe import Recipe
from pipeline.training.engines.engine_config import deepspeed_config
from pipeline.training.stage_plan import Stage, plan_stages
from pipeline.training.start_checks import Machine, check_stage

# What a core reads, decodes, crops and scales of 256-pixel JPEGs (benchmarks/results/loader.json: 1.08 ms each).
IMAGES_PER_CORE_S = 900
# The same for crops of 112 pixels from an edition of 128 (`low_resolution` there), which a stage that names data of its
# own is taken to read.
SMALL_IMAGES_PER_CORE_S = 2_400
# What it encodes and masks of captions alone, about: Flickr8k's took 0.16 ms each (docs/log.md).
CAPTIONS_PER_CORE_S = 6_000
_DAY_S, _HOUR_S = 86_400, 3_600


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for.

    mfu: the utilisation to assume instead of estimating it
    cores: CPU cores of each GPU's loader; None: as many as it takes
    """

    gpus: int
    accelerator: Accelerator
    network: Interconnect
    mfu: float | None = None
    cores: float | None = None

    @property
    def machine(self) -> Machine:
        """What a run's checks ask of it."""
        return Machine(f"a {self.accelerator.name}", on_gpu=True, has_bf16=self.accelerator.has_bf16)


@dataclass(frozen=True)
class Suggestion:
    """Options that make a step of the same batch cheaper, or make it fit."""

    options: dict[str, str | int | bool]
    memory: Memory
    time: StepTime


@dataclass(frozen=True)
class StagePlan:
    """What one stage needs; `cores` as of the hardware, `has_small_pictures` where it reads an edition."""

    stage: Stage
    load: Workload
    memory: Memory
    traffic: list[Traffic]
    time: StepTime
    fits: bool
    suggestion: Suggestion | None
    cores: float | None
    has_small_pictures: bool

    @property
    def seconds(self) -> float:
        """All steps, without stops and evaluations."""
        return self.stage.num_steps * self.fed_step_s

    @property
    def fed_step_s(self) -> float:
        """A step's time where the loader's cores may bind."""
        return self.time.step_s * max(1.0, self.loader_cores / self.cores if self.cores else 0.0)

    @property
    def images_per_s_per_gpu(self) -> float:
        """Images, or captions alone: what the loader of each rank has to deliver not to bind."""
        return self.load.micro_batch_size * self.load.accumulation_steps / self.time.step_s

    @property
    def loader_cores(self) -> float:
        """CPU cores a rank needs for that."""
        return self.images_per_s_per_gpu / self.samples_per_core_s

    @property
    def samples_per_core_s(self) -> int:
        """Images, or captions alone, that a core makes ready."""
        if self.stage.masks_words:
            return CAPTIONS_PER_CORE_S
        return SMALL_IMAGES_PER_CORE_S if self.has_small_pictures else IMAGES_PER_CORE_S


@dataclass(frozen=True)
class RunPlan:
    """All stages. `caption_tokens` is what was assumed of captions."""

    hardware: Hardware
    caption_tokens: float
    stages: list[StagePlan]

    @property
    def fits(self) -> bool:
        """Whether every stage fits the device's memory."""
        return all(plan.fits for plan in self.stages)

    @property
    def days(self) -> float:
        """Of training, all stages."""
        return sum(plan.seconds for plan in self.stages) / _DAY_S

    @property
    def gpu_hours(self) -> float:
        """Devices times hours."""
        return sum(plan.seconds for plan in self.stages) / _HOUR_S * self.hardware.gpus


def this_accelerator(device: torch.device) -> Accelerator:
    """A GPU of this machine, with the memory it has; one whose speed is not known is taken to be as fast as an A100."""
    known = accelerator_of(torch.cuda.get_device_name(device)) or find_accelerator("a100")
    _, memory_bytes = torch.cuda.mem_get_info(device)
    return replace(known, name="this GPU", memory_bytes=memory_bytes, has_bf16=Machine.of(device).has_bf16)


def plan_run(
    recipe: Recipe,
    hardware: Hardware,
    samples: int | Callable[[Recipe], Epochs],
    caption_tokens: float,
    vocab_size: int,
    eot_token_id: int,
) -> RunPlan:
    """Plan a recipe; `samples` is what `plan_stages` takes. Raises UserError for what a run would refuse."""
    stages = plan_stages(recipe, samples, hardware.gpus, vocab_size, eot_token_id, read=planned_curriculum)
    for stage in stages:
        check_stage(stage, _config(stage), hardware.machine)
    plans = [
        plan_stage(stage, hardware, caption_tokens, stage.recipe.data.train != recipe.data.train) for stage in stages
    ]
    return RunPlan(hardware, caption_tokens, plans)


def plan_stage(stage: Stage, hardware: Hardware, caption_tokens: float, has_small_pictures: bool = False) -> StagePlan:
    """What a stage needs, and what would suit the hardware better."""
    load = _load(stage, hardware, caption_tokens)
    memory, time = estimate_memory(load), _time(load, hardware)
    fits = memory.device_bytes <= hardware.accelerator.memory_bytes
    suggestion = suggest(stage, hardware, caption_tokens)
    if suggestion is not None and fits and suggestion.time.step_s > 0.97 * time.step_s:
        suggestion = None
    traffic, cores = step_traffic(load), hardware.cores
    return StagePlan(stage, load, memory, traffic, time, fits, suggestion, cores, has_small_pictures)


def suggest(stage: Stage, hardware: Hardware, caption_tokens: float) -> Suggestion | None:
    """The fastest way to the same batch that fits, of ZeRO's lower stages if there is one.

    Micro-batches that keep the number of negatives go first: others train another loss.
    """
    found: list[tuple[tuple[bool, bool, float, int, bool], Suggestion]] = []
    for options, variant in _variants(stage):
        load = _load(variant, hardware, caption_tokens)
        memory = estimate_memory(load)
        if memory.device_bytes > hardware.accelerator.memory_bytes or not _is_allowed(variant, hardware):
            continue
        time = _time(load, hardware)
        fewer_negatives = load.global_micro_batch < stage.batches.micro_batch_size * hardware.gpus
        unlike = fewer_negatives and not load.cache_gradients
        # what many small gathers of stage 3 wait for is not estimated: only where nothing else fits
        rank = (unlike, load.zero_stage == 3, round(time.step_s, 3), load.zero_stage, load.checkpoint_blocks)
        found.append((rank, Suggestion(options, memory, time)))
    return min(found, key=lambda item: item[0])[1] if found else None


def _variants(stage: Stage) -> Iterator[tuple[dict[str, str | int | bool], Stage]]:
    """The stage with every micro-batch, ZeRO stage and way to keep activations that its batch allows."""
    per_rank = stage.batches.global_batch_size // stage.batches.world_size
    for micro_batch_size in _divisors(per_rank):
        batches = replace(stage.batches, micro_batch_size=micro_batch_size)
        for template in _templates(stage.recipe.train.deepspeed_config):
            for checkpointing in (False, True):
                changes: dict[str, str | int | bool] = {
                    "micro_batch_size": micro_batch_size,
                    "deepspeed_config": template,
                    "activation_checkpointing": checkpointing,
                }
                train = stage.recipe.train.model_copy(update=changes)
                recipe = stage.recipe.model_copy(update={"train": train})
                new = {f"train.{k}": v for k, v in changes.items() if v != getattr(stage.recipe.train, k)}
                yield new, replace(stage, recipe=recipe, batches=batches)


def _divisors(number: int) -> list[int]:
    """Halves of a number while they are whole, and the number itself: micro-batches that fill a batch."""
    found = [number]
    while found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found


def _templates(chosen: str) -> Sequence[str]:
    """The recipe's own template first, then those that share out more or less."""
    others = ("zero1_bf16", "zero2_bf16", "zero3_bf16")
    return (chosen, *(name for name in others if name != chosen)) if chosen in others else (chosen,)


def _config(stage: Stage) -> dict[str, Any]:
    return deepspeed_config(stage.recipe, stage.batches, stage.recipe.train.deepspeed_config)


def _is_allowed(stage: Stage, hardware: Hardware) -> bool:
    try:
        check_stage(stage, _config(stage), hardware.machine)
    except UserError:
        return False
    return True


def _load(stage: Stage, hardware: Hardware, caption_tokens: float) -> Workload:
    return workload_of(stage, _config(stage), caption_tokens, has_flash=hardware.accelerator.has_bf16)


def _time(load: Workload, hardware: Hardware) -> StepTime:
    return step_time(load, hardware.accelerator, hardware.network, hardware.mfu)
