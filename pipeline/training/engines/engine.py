"""The DeepSpeed engine; with fragments.py and template.py the only ones that know DeepSpeed."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from model.clip import CLIP
from pipeline.ranks import Ranks
from pipeline.recipe import OptimizerSection, Recipe
from pipeline.training.engines.engine_config import offload_device
from pipeline.training.engines.gradient_norm import clip_gradients
from pipeline.training.engines.optimizer import freeze_towers, make_optimizer, parameter_groups

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def make_engine(clip: CLIP, recipe: Recipe, config: dict[str, Any], ranks: Ranks) -> DeepSpeedEngine:
    """Wrap the model and its optimizer; the process group must exist."""
    if ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    # An inference-only all-reduce for CPUs that would cost a minute of C++ compilation at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    freeze_towers(clip, recipe.optimizer)
    optimizer = _make_optimizer(clip, recipe.optimizer, config)
    engine, _, _, _ = deepspeed.initialize(model=clip, optimizer=optimizer, config=config)
    clip_gradients(engine, recipe.optimizer.max_grad_norm)
    return engine


def _make_optimizer(clip: CLIP, section: OptimizerSection, config: dict[str, Any]) -> Optimizer:
    if section.name != "deepspeed_adamw":
        return make_optimizer(clip, section)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    # both are AdamW unless told otherwise, and compiled at their first start on a machine, which takes minutes
    kind = DeepSpeedCPUAdam if offload_device(config, "optimizer") == "cpu" else FusedAdam
    betas = (section.beta1, section.beta2)
    optimizer: Optimizer = kind(parameter_groups(clip, section), lr=section.lr, betas=betas, eps=section.eps)
    return optimizer


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
