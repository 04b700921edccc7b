"""The DeepSpeed engine; the only module, with checkpoint.py, that knows DeepSpeed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from model.clip import CLIP
from pipeline.data.sample_order import BatchPlan
from pipeline.errors import UserError
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.training.optimizer import make_optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

TEMPLATES_DIRECTORY = Path(__file__).resolve().parents[2] / "ds_configs"

# What a template must leave to the recipe, so that a number is said in one place only.
_RECIPE_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)


def deepspeed_config(recipe: Recipe, plan: BatchPlan, template: str) -> dict[str, Any]:
    """A template of ds_configs/ (by name, or a path) completed with the recipe's batch sizes and clipping.

    Raises UserError if there is no such template, or if it sets what the recipe sets.
    """
    config = _read_template(template)
    doubled = [key for key in _RECIPE_KEYS if key in config]
    if doubled:
        raise UserError(f"{template}: remove {', '.join(doubled)}: the recipe sets batch sizes, clipping and optimizer")
    return config | {
        "train_batch_size": plan.global_batch_size,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "zero_allow_untested_optimizer": True,  # torch's AdamW is the client optimizer
        "steps_per_print": 1 << 62,  # the trainer reports its own progress
    }


def _read_template(template: str) -> dict[str, Any]:
    is_path = template.endswith(".json") or "/" in template
    path = Path(template) if is_path else TEMPLATES_DIRECTORY / f"{template}.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(path.stem for path in TEMPLATES_DIRECTORY.glob("*.json")))
        raise UserError(f"no DeepSpeed config {template!r}; known: {known}, or give the path of a JSON file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file: {error}") from error
    return config


def zero_stage(config: dict[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def is_bf16(config: dict[str, Any]) -> bool:
    """Whether a DeepSpeed config computes in bf16."""
    return bool(config.get("bf16", {}).get("enabled", False))


def make_engine(clip: CLIP, recipe: Recipe, config: dict[str, Any], ranks: Ranks) -> DeepSpeedEngine:
    """Wrap the model and its AdamW; the process group must exist. Nothing is compiled at run time."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # An inference-only all-reduce for CPUs that would cost a minute of C++ compilation at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, _, _, _ = deepspeed.initialize(model=clip, optimizer=make_optimizer(clip, recipe.optimizer), config=config)
    return engine


def release(engine: DeepSpeedEngine) -> None:
    """Give back the memory of an engine: weights, gradients, optimiser state. It cannot be used any more."""
    from deepspeed.runtime.zero import parameter_offload

    module, optimizer = engine.module, engine.optimizer
    engine.destroy()
    # ZeRO stage 3 ties parameters, optimiser and autograd nodes into cycles that Python's collector cannot see through,
    # and keeps every model in this list: so what holds memory is taken away from them
    parameter_offload.FWD_MODULE_STACK.clear()
    adamw = getattr(optimizer, "optimizer", optimizer)  # stage 0 does not wrap it
    adamw.state.clear()
    adamw.param_groups.clear()
    optimizer.__dict__.clear()
    for parameter in module.parameters():
        parameter.__dict__.clear()
        parameter.data, parameter.grad = parameter.new_empty(0), None


@contextlib.contextmanager
def gathered_weights(module: nn.Module, names: Collection[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """A module's parameters by name, or some of them, whole even where ZeRO stage 3 keeps shards. Collective."""
    parameters = {name: value for name, value in module.named_parameters() if names is None or name in names}
    sharded = [parameter for parameter in parameters.values() if hasattr(parameter, "ds_id")]
    if not sharded:
        yield {name: parameter.data for name, parameter in parameters.items()}
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded):
        yield {name: parameter.data for name, parameter in parameters.items()}
