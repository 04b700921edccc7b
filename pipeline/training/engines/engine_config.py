"""DeepSpeed configurations: a template of ds_configs/, the recipe's numbers and precision; and what is refused."""

from __future__ import annotations

from typing import Any

from pipeline.data.sample_order import BatchPlan
from pipeline.recipe import Precision, Recipe
from pipeline.training.engines.template import read_template

# Of gradients of micro-batches, and of ranks.
MOST_TERMS_IN_BF16 = 8
# The block of a configuration that each precision is; none of them is fp32.
_PRECISION_BLOCKS: dict[Precision, tuple[str, dict[str, Any]]] = {
    "bf16": ("bf16", {"enabled": True}),
    "fp16": ("fp16", {"enabled": True}),  # with a dynamic loss scale
    "autocast": ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}),
}


def deepspeed_config(recipe: Recipe, plan: BatchPlan, template: str) -> dict[str, Any]:
    """A template of ds_configs/ (by name, or a path) completed with the recipe's batch sizes and precision.

    Raises UserError if there is no such template, if DeepSpeed does not take it, or if it sets what the recipe sets.
    """
    config = _with_precision(read_template(template), recipe.train.precision)
    config = _without_waits(_with_exact_sums(config, plan))
    return config | {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": 0.0,  # train_step.py clips, on the device
        "zero_allow_untested_optimizer": True,  # torch's AdamW is the client optimizer
        "zero_force_ds_cpu_optimizer": False,  # on a CPU too: DeepSpeed's own would be compiled at the first start
        "steps_per_print": 1 << 62,  # the trainer reports its own progress
        "timers": {"throughput": {"enabled": False}},  # it waits for the device around every micro-batch
    }


def _with_precision(config: dict[str, Any], precision: Precision | None) -> dict[str, Any]:
    own = precision_of(config)
    if precision is None or precision == own:
        return config
    keys = [key for key, _ in _PRECISION_BLOCKS.values()]
    block = [_PRECISION_BLOCKS[precision]] if precision in _PRECISION_BLOCKS else []
    return {key: value for key, value in config.items() if key not in keys} | dict(block)


def _with_exact_sums(config: dict[str, Any], plan: BatchPlan) -> dict[str, Any]:
    """A sum of many bf16 gradients is made in fp32: in bf16 one of 32 equal ones is 1.5 % off, one of 128 6 %."""
    if precision_of(config) == "bf16" and plan.accumulation_steps > MOST_TERMS_IN_BF16:
        config = {"data_types": {"grad_accum_dtype": "fp32"}} | config
    if precision_of(config) == "bf16" and plan.world_size > MOST_TERMS_IN_BF16:
        config = {"communication_data_type": "fp32"} | config
    return config


def accumulates_in_fp32(config: dict[str, Any]) -> bool:
    """Whether micro-batches' bf16 gradients add up in fp32: in stage 1 in a copy of all, else in this rank's share."""
    return precision_of(config) == "bf16" and config.get("data_types", {}).get("grad_accum_dtype") == "fp32"


def reduces_in_fp32(config: dict[str, Any]) -> bool:
    """Whether 16-bit gradients travel between ranks in fp32: twice the bytes, and twice the bucket."""
    return precision_of(config) in ("bf16", "fp16") and config.get("communication_data_type") == "fp32"


def _without_waits(config: dict[str, Any]) -> dict[str, Any]:
    """Have DeepSpeed not ask the host, in every step, about what train_step.py sees to."""
    precision, zero = precision_of(config), dict(config.get("zero_optimization", {}))
    if precision == "bf16":
        config = config | {"bf16": {"check_grad_overflow": False} | config["bf16"]}
    # what DeepSpeed can do without: not in fp16, offloaded, or with sums in another precision
    is_plain = precision != "fp16" and offload_device(config, "optimizer") == "none"
    if is_plain and (zero_stage(config) == 2 or (zero_stage(config) == 1 and not accumulates_in_fp32(config))):
        zero.setdefault("compute_grad_norm", False)
    return config | {"zero_optimization": zero}


def precision_of(config: dict[str, Any]) -> Precision:
    """In what a DeepSpeed config computes."""
    return next((name for name, (key, _) in _PRECISION_BLOCKS.items() if config.get(key, {}).get("enabled")), "fp32")


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def offload_device(config: dict[str, Any], what: str) -> str:
    """Where `optimizer` states or `param`eters of a DeepSpeed config are kept: none (the GPU), cpu or nvme."""
    return str(config.get("zero_optimization", {}).get(f"offload_{what}", {}).get("device", "none"))
