"""What cannot work is refused before anything starts: the same list for a run, its plan and one simulated rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from formats.errors import UserError
from pipeline.recipe import OptimizerSection
from pipeline.training.engines.engine_config import offload_device, precision_of, zero_stage
from pipeline.training.stage_plan import Stage


@dataclass(frozen=True)
class Machine:
    """What the checks ask of a rank's device; `name` is what messages call it."""

    name: str
    on_gpu: bool
    has_bf16: bool

    @staticmethod
    def of(device: torch.device) -> Machine:
        """The machine that this process computes on."""
        if device.type == "cuda":
            return Machine("this GPU", on_gpu=True, has_bf16=torch.cuda.is_bf16_supported(including_emulation=False))
        # a torch built without oneDNN does not even have the question
        has_bf16 = torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return Machine("this CPU", on_gpu=False, has_bf16=has_bf16)


def check_stage(stage: Stage, config: dict[str, Any], machine: Machine) -> None:
    """Raise UserError, in a line that names the stage, for one that cannot be trained so on this machine."""
    try:
        _check_negatives(stage)
        check_config(config, stage.batches.world_size, machine)
        check_optimizer(stage.recipe.optimizer, config)
        check_computable(stage, config, machine)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}" if stage.name else str(error)) from None


def warnings_about(stage: Stage) -> list[str]:
    """What can be trained but is hardly meant, a line each."""
    section, steps = stage.recipe.optimizer, stage.schedule_steps
    if section.warmup_steps <= steps:
        return []
    where = f"stage {stage.name}: " if stage.name else ""
    reached = section.lr * steps / section.warmup_steps
    return [
        f"warning: {where}optimizer.warmup_steps {section.warmup_steps:,} are more than the {steps:,} steps: the "
        f"learning rate ends at {reached:.3g} and never reaches its peak of {section.lr:g}"
    ]


def warnings_about_precision(config: dict[str, Any], machine: Machine) -> list[str]:
    """What a machine computes only in a roundabout way."""
    if machine.has_bf16 or machine.on_gpu or precision_of(config) == "fp32":  # on a GPU it is refused
        return []
    return [
        f"warning: {machine.name} has no instructions for bf16, in which products take it many times longer than in "
        "fp32: take train.deepspeed_config=zero1_fp32"
    ]


def _check_negatives(stage: Stage) -> None:
    """A loss over one pair has nothing to tell it from: the softmax is 1 and its gradient 0 from the first step on."""
    if stage.pairs_at_once > 1 or stage.masks_words:
        return
    batches = stage.batches
    if batches.global_batch_size == 1:
        raise UserError("a batch of one pair teaches nothing: raise train.global_batch_size and train.micro_batch_size")
    raise UserError(
        f"train.micro_batch_size {batches.micro_batch_size} x {batches.world_size} rank = 1 pair at once, which meets "
        f"no other and teaches nothing: raise micro_batch_size, or set loss.cache_gradients=true to compare all "
        f"{batches.global_batch_size} pairs of the batch"
    )


def check_config(config: dict[str, Any], world_size: int, machine: Machine) -> None:
    """Raise UserError for what the machine, or DeepSpeed, cannot do; each would fail later and say less."""
    zero, stage, precision = config.get("zero_optimization", {}), zero_stage(config), precision_of(config)
    if precision == "fp16" and not machine.on_gpu:
        raise UserError("fp16 needs a GPU: take train.precision=bf16 or fp32")
    if precision in ("bf16", "autocast") and machine.on_gpu and not machine.has_bf16:
        raise UserError(f"{machine.name} does not compute in bf16: take train.precision=fp16")
    if stage == 0 and precision in ("bf16", "fp16"):
        raise UserError(
            f"ZeRO stage 0 in {precision} loses accuracy (ds_configs/README.md): take "
            "train.deepspeed_config=zero1_bf16, or train.precision=autocast"
        )
    for what, least in (("optimizer", 1), ("param", 3)):
        device = offload_device(config, what)
        if device == "nvme":
            raise UserError(f"offload_{what} to nvme is not supported: take device cpu")
        if device == "cpu" and stage < least:
            raise UserError(f"offload_{what} needs ZeRO stage {least} or above, not {stage}")
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
    if quantized and not machine.on_gpu:
        raise UserError(f"{' and '.join(quantized)} need GPUs: take train.deepspeed_config=zero3_bf16")
    group = int(zero.get("zero_hpz_partition_size", 1))
    if group < 1 or world_size % group:
        raise UserError(
            f"zero_hpz_partition_size {group} does not divide {world_size} ranks: set it to the ranks of a node"
        )


def check_optimizer(section: OptimizerSection, config: dict[str, Any]) -> None:
    """Raise UserError for an optimizer that does not work with a DeepSpeed config."""
    if section.name != "muon":
        return
    if zero_stage(config) == 3:
        raise UserError(
            "optimizer.name=muon does not work with ZeRO stage 3, where every rank has a piece of every matrix and "
            "would orthogonalise all of them: take a train.deepspeed_config of stage 1 or 2"
        )
    if offload_device(config, "optimizer") != "none":
        raise UserError("optimizer.name=muon does not work on the CPU: take a train.deepspeed_config without offload")


def check_computable(stage: Stage, config: dict[str, Any], machine: Machine) -> None:
    """Raise UserError for a way to compute the model that the machine or configuration does not have."""
    attention = stage.recipe.model.attention
    if attention in ("varlen", "flex") and not machine.on_gpu:
        raise UserError(f"model.attention={attention} needs a GPU to train on: take auto or buckets")
    if attention == "varlen" and not machine.has_bf16:  # both came with compute capability 8.0
        raise UserError(f"model.attention=varlen needs a GPU of compute capability 8.0, which {machine.name} is not")
    if attention == "varlen" and precision_of(config) == "fp32":
        raise UserError("model.attention=varlen needs 16-bit floats: take train.precision=bf16, or auto")
    if stage.recipe.train.compile and zero_stage(config) == 3:
        raise UserError(
            "train.compile does not work with ZeRO stage 3, which replaces parameters while the model runs: "
            "take train.deepspeed_config of stage 1 or 2"
        )
