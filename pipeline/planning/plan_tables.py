"""A plan as text for people and as plain values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pipeline.hardware import Accelerator, find_interconnect
from pipeline.planning.memory import FRAGMENTATION, RESERVED_BYTES
from pipeline.planning.run_plan import (
    Hardware,
    RunPlan,
    StagePlan,
    Suggestion,
    plan_stage,
    this_accelerator,
)
from pipeline.planning.workload import Workload
from pipeline.training.stage_plan import CAPTION_TOKENS, Stage
from pipeline.training.start_checks import warnings_about

_GB, _TERA = 1e9, 1e12


def describe(plan: RunPlan) -> str:
    """The plan in lines."""
    lines = [_heading(plan.hardware)]
    for stage in plan.stages:
        if stage.stage.name is not None:
            lines += ["", f"stage {stage.stage.name}"]
        lines += ["", *_stage_lines(stage, plan), *warnings_about(stage.stage)]
    lines += ["", _total(plan)]
    return "\n".join(lines)


def _heading(hardware: Hardware) -> str:
    gpu = hardware.accelerator
    text = f"{hardware.gpus:,} x {gpu.name}: {gpu.memory_bytes / _GB:.0f} GB, "
    text += f"{gpu.bf16_flops_per_s / _TERA:,.0f} TFLOP/s in bf16, {gpu.memory_bytes_per_s / _TERA:.2f} TB/s"
    if hardware.gpus > gpu.per_node:
        nodes = -(-hardware.gpus // gpu.per_node)
        text += f"; {nodes:,} nodes, {hardware.network.name} ({hardware.network.bytes_per_s / _GB:g} GB/s for each GPU)"
    return text


def _stage_lines(plan: StagePlan, run: RunPlan) -> list[str]:
    load, stage, time = plan.load, plan.stage, plan.time
    state = "stored" if not load.checkpoint_blocks else "recomputed"
    rows = [
        (
            "model",
            f"{load.model.name}, {load.parameters.total / 1e6:,.1f} M parameters, {load.precision}, "
            f"ZeRO stage {load.zero_stage}, blocks {state}",
        ),
        (
            "batch",
            f"{stage.batches.global_batch_size:,} = {load.micro_batch_size:,} x {load.accumulation_steps} x "
            f"{load.world_size:,} ranks",
        ),
        ("tokens", _tokens(load, run.caption_tokens)),
        ("operations", f"{time.flops / _TERA:,.1f} TFLOP a step and GPU"),
    ]
    lines = [f"{name:12s}{text}" for name, text in rows]
    return [*lines, "", *_memory_lines(plan, run), "", *_traffic_lines(plan), "", *_time_lines(plan, run)]


def _tokens(load: Workload, caption_tokens: float) -> str:
    if load.masked_words:
        return f"captions alone, {caption_tokens:g} tokens each; {load.masked_words:,} of a micro-batch are predicted"
    patches = f"{load.patches / load.micro_batch_size:,.1f} of {load.model.vision.num_patches:,} patches an image"
    return f"{patches}, {caption_tokens:g} tokens a caption"


def _memory_lines(plan: StagePlan, run: RunPlan) -> list[str]:
    lines = [f"memory of a GPU when {plan.memory.moment}, GB"]
    lines += [f"  {name:26s}{size / _GB:9.2f}" for name, size in plan.memory.parts.items()]
    lines.append(f"  {'tensors':26s}{plan.memory.tensor_bytes / _GB:9.2f}")
    reserve = f"with {FRAGMENTATION:.0%} between them and {RESERVED_BYTES / _GB:.1f} outside of torch's allocator"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    limit = run.hardware.accelerator.memory_bytes / _GB
    lines.append(f"  {'all':26s}{plan.memory.device_bytes / _GB:9.2f}  of {limit:.1f}: {verdict} ({reserve})")
    if plan.memory.host_bytes:
        lines.append(f"  {'of the host, for each GPU':26s}{plan.memory.host_bytes / _GB:9.2f}")
    if plan.suggestion is not None:
        lines.append(f"  {'suggestion':26s}{_describe_suggestion(plan.suggestion)}")
    elif not plan.fits:
        lines.append("  nothing in micro-batch, ZeRO stage and recomputation makes this batch fit: take more GPUs")
    return lines


def _describe_suggestion(suggestion: Suggestion) -> str:
    options = " ".join(f"{name}={_option(value)}" for name, value in suggestion.options.items())
    return f"{options}: {suggestion.memory.device_bytes / _GB:.1f} GB, {suggestion.time.step_s:.3f} s a step"


def _option(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _traffic_lines(plan: StagePlan) -> list[str]:
    if not plan.traffic:
        return ["communication: none, one rank"]
    lines = ["communication of a step"]
    for traffic in plan.traffic:
        wire = traffic.wire_bytes(plan.load.world_size) / _GB
        beside = ", beside the backward pass" if traffic.overlapped else ""
        name = f"{traffic.purpose}, {traffic.operation.replace('_', '-')}"
        lines.append(f"  {name:26s}{traffic.payload_bytes / _GB:9.3f} GB, a rank sends {wire:.3f} GB{beside}")
    return lines


def _time_lines(plan: StagePlan, run: RunPlan) -> list[str]:
    time, stage = plan.time, plan.stage
    bound = "the host, which launches kernels" if time.host_s > time.compute_s else "the device"
    samples = "captions" if plan.stage.masks_words else "images"
    assumed = f"at the given {run.hardware.mfu:.0%}" if run.hardware.mfu else f"bound by {bound}"
    lines = [
        f"time        {time.step_s:.3f} s a step: {max(time.compute_s, time.host_s):.3f} computing ({assumed}), "
        f"{time.exposed_s:.3f} waiting for collectives ({time.communication_s:.3f} in all)",
        f"            {time.mfu:.0%} of the data sheet's products; {plan.images_per_s_per_gpu:,.0f} {samples}/s a GPU, "
        f"which takes {plan.loader_cores:.1f} CPU cores a GPU at {plan.samples_per_core_s:,} {samples}/s a core",
    ]
    if plan.cores and plan.fed_step_s > time.step_s:
        lines.append(
            f"            {plan.fed_step_s:.3f} s a step with {plan.cores:g} cores a GPU: bound by the loader, "
            f"which delivers {plan.cores * plan.samples_per_core_s:,.0f} {samples}/s"
        )
    return [
        *lines,
        f"            {stage.num_steps:,} steps, {stage.num_samples:,} samples: {plan.seconds / 3600:,.1f} hours",
    ]


def _total(plan: RunPlan) -> str:
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return f"{verdict}; {plan.days:,.2f} days, {plan.gpu_hours:,.0f} GPU-hours"


def plan_warnings(stages: Sequence[Stage], device: torch.device) -> list[str]:
    """What is to be said of a plan before this device follows it: nothing on a CPU, whose memory is not known."""
    return memory_warnings(stages, this_accelerator(device)) if device.type == "cuda" else []


def memory_warnings(stages: Sequence[Stage], accelerator: Accelerator) -> list[str]:
    """Stages that the memory of each rank's device will probably not hold, with the arithmetic and what it would hold.

    A warning and no refusal: captions may be shorter than is assumed, and the estimate has its errors (docs/plan.md).
    """
    warnings = []
    for stage in stages:
        hardware = Hardware(stage.batches.world_size, accelerator, find_interconnect("ndr"))
        plan = plan_stage(stage, hardware, min(CAPTION_TOKENS, stage.recipe.context_length))
        if plan.fits:
            continue
        parts = sorted(plan.memory.parts.items(), key=lambda part: -part[1])[:3]
        fits = "take more ranks, or a smaller batch"
        if plan.suggestion is not None:
            fits = _describe_suggestion(plan.suggestion)
        where = f"stage {stage.name}: " if stage.name else ""
        warnings.append(
            f"warning: {where}{plan.memory.device_bytes / _GB:.1f} GB are needed, about, when {plan.memory.moment} "
            f"({', '.join(f'{name} {size / _GB:.1f}' for name, size in parts)}, …); {accelerator.name} has "
            f"{accelerator.memory_bytes / _GB:.1f}; what would fit: {fits}"
        )
    return warnings


def to_dict(plan: RunPlan) -> dict[str, Any]:
    """Plain values, units in the names."""
    return {
        "gpus": plan.hardware.gpus,
        "gpu": plan.hardware.accelerator.name,
        "memory_bytes": plan.hardware.accelerator.memory_bytes,
        "interconnect": plan.hardware.network.name,
        "caption_tokens": plan.caption_tokens,
        "fits": plan.fits,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "stages": [_stage_to_dict(stage) for stage in plan.stages],
    }


def _stage_to_dict(plan: StagePlan) -> dict[str, Any]:
    load, time = plan.load, plan.time
    return {
        "name": plan.stage.name,
        "model": load.model.name,
        "parameters": load.parameters.total,
        "precision": load.precision,
        "zero_stage": load.zero_stage,
        "micro_batch_size": load.micro_batch_size,
        "accumulation_steps": load.accumulation_steps,
        "activation_checkpointing": load.checkpoint_blocks,
        "steps": plan.stage.num_steps,
        "samples": plan.stage.num_samples,
        "flops_per_step_per_gpu": time.flops,
        "memory": {
            "moment": plan.memory.moment,
            "parts_bytes": plan.memory.parts,
            "tensor_bytes": plan.memory.tensor_bytes,
            "device_bytes": plan.memory.device_bytes,
            "host_bytes": plan.memory.host_bytes,
        },
        "communication": [
            {
                "purpose": traffic.purpose,
                "operation": traffic.operation,
                "payload_bytes": traffic.payload_bytes,
                "wire_bytes": round(traffic.wire_bytes(load.world_size)),
                "overlapped": traffic.overlapped,
            }
            for traffic in plan.traffic
        ],
        "step_s": time.step_s,
        "fed_step_s": plan.fed_step_s,
        "compute_s": time.compute_s,
        "host_s": time.host_s,
        "communication_s": time.communication_s,
        "exposed_s": time.exposed_s,
        "mfu": time.mfu,
        "images_per_s_per_gpu": plan.images_per_s_per_gpu,
        "loader_cores_per_gpu": plan.loader_cores,
        "samples_per_core_s": plan.samples_per_core_s,
        "fits": plan.fits,
        "warnings": warnings_about(plan.stage),
        "suggestion": None
        if plan.suggestion is None
        else plan.suggestion.options
        | {"device_bytes": plan.suggestion.memory.device_bytes, "step_s": plan.suggestion.time.step_s},
    }
