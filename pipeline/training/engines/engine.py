"""What DeepSpeed is asked to do; beside fragments.py, template.py and rank_state.py nothing else knows it.

A step calls `backward` for each micro-batch, then `gradient_norm`, then `update`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim import Optimizer

from model.clip import CLIP
from pipeline.ranks import Ranks
from pipeline.recipe import OptimizerSection, Precision, Recipe
from pipeline.training.engines.engine_config import offload_device, precision_of
from pipeline.training.engines.fragments import (
    Fragment,
    find_fragments,
    full_weights,
    load_full_weights,
)
from pipeline.training.engines.optimizer import freeze_towers, make_optimizer, parameter_groups

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# Of gradients in 16 bits, that fp32 copies are made of at a time where a CPU sums their squares.
_NORM_ELEMENTS = 1 << 20


class Engine:
    """A model, its optimizer and how ranks share them.

    deepspeed: for what reads and writes its shares of the weights (fragments.py)
    module: the model; under ZeRO stage 3 a rank has its parameters only while they are used
    """

    def __init__(
        self, deepspeed: DeepSpeedEngine, precision: Precision, frozen: Mapping[str, Tensor] | None = None
    ) -> None:
        """frozen: fp32 values of parameters that are not trained, where the model has them in 16 bits (main rank)"""
        self._frozen = dict(frozen or {})
        self.deepspeed = deepspeed
        self.precision: Precision = precision
        self.module: CLIP = deepspeed.module
        self.stage: int = deepspeed.zero_optimization_stage()
        self._optimizer: Any = deepspeed.basic_optimizer
        self._scalars: list[tuple[int, Fragment]] = []
        if precision in ("bf16", "fp16"):
            fragments = find_fragments(deepspeed)
            names = enumerate(("logit_scale", "logit_bias"))
            self._scalars = [(number, fragments[name]) for number, name in names if name in fragments]

    def __call__(self, *inputs: Any) -> Any:
        """The model's forward pass."""
        return self.deepspeed(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients; with the step's last, they are the means over micro-batches and ranks."""
        is_last = self.deepspeed.is_gradient_accumulation_boundary()
        self.deepspeed.backward(loss)
        if not is_last:
            self.deepspeed.step()  # counts the micro-batch

    def gradient_norm(self) -> Tensor:
        """Of the step's gradients on all ranks, fp32 scalar; infinite or NaN where one of them is. Collective."""
        gradients = [piece.flatten() for _, pieces in self.gradients() for piece in pieces]
        parts = [part for gradient in gradients for part in gradient.split(_NORM_ELEMENTS)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts, 2, torch.float32)))
        if self.stage > 0:  # a rank has a share of them
            square = norm.square().to(self.deepspeed.device)
            dist.all_reduce(square)
            norm = square.sqrt()
        return norm / self.loss_scale if self.precision == "fp16" else norm

    def gradients(self) -> list[tuple[Tensor, list[Tensor]]]:
        """Each holder, and what lies end to end in its gradient; after a step's last backward pass."""
        optimizer: Any = self.deepspeed.optimizer
        if optimizer is self.deepspeed.basic_optimizer:
            return [(p, [p.grad]) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        is_stage_3 = self.stage == 3
        groups = [] if is_stage_3 else self.deepspeed.basic_optimizer.param_groups
        holders = optimizer.fp32_partitioned_groups_flat if is_stage_3 else [group["params"][0] for group in groups]
        if self.deepspeed.zero_cpu_offload():
            if self.deepspeed.device.type == "cuda":
                torch.cuda.synchronize()  # gradients may be on their way to the CPU
            return [(holder, [holder.grad]) for holder in holders]
        sums_in_fp32 = getattr(optimizer, "fp32_groups_gradient_flat_partition", None)
        if sums_in_fp32 is not None:  # stage 1
            return [(holder, [gradient]) for holder, gradient in zip(holders, sums_in_fp32, strict=True)]
        return list(zip(holders, optimizer.averaged_gradients.values(), strict=True))

    def update(self, divide_by: Tensor | None, skip: Tensor) -> None:
        """Update the weights with gradients divided by a scalar; where `skip` is 1 and not 0, nothing changes.

        Both are on the device and the host does not look at them: this is how torch tells its own optimizers.
        """
        self._optimizer.grad_scale, self._optimizer.found_inf = divide_by, skip
        self.deepspeed.step()
        self._share_scalars()

    def set_learning_rate(self, lr: float) -> None:
        """Of the updates to come; each group of parameters has its share (optimizer.py)."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]

    def weights(self, ranks: Ranks) -> dict[str, Tensor]:
        """All fp32 weights in the main rank's memory, whatever the stage; nothing on other ranks. Collective."""
        return full_weights(self.deepspeed, ranks) | self._frozen

    def load_weights(self, file: Path) -> None:
        """Take over what `weights` gave, now in a file. Collective."""
        load_full_weights(self.deepspeed, file)
        if self._frozen:
            with safe_open(file, framework="pt") as weights:
                self._frozen = {name: weights.get_tensor(name) for name in self._frozen}
        self._share_scalars()

    def set_scalars(self, scalars: Mapping[str, Tensor]) -> None:
        """Give the model's scalars the fp32 values that they had before DeepSpeed rounded them. Collective."""
        for _, fragment in self._scalars:
            fragment.of_holder(fragment.holder).copy_(scalars[fragment.name])
        self._share_scalars()

    @torch.no_grad()
    def _share_scalars(self) -> None:
        """Let the model compute with the fp32 values of its scalars, of which its parameters are roundings."""
        if self.precision not in ("bf16", "fp16"):
            return
        exact = torch.zeros(2, device=self.deepspeed.device)
        for number, fragment in self._scalars:
            exact[number] = fragment.holder.detach().view(-1)[fragment.offset]
        dist.all_reduce(exact)  # one rank has each
        rounded = exact.to(torch.bfloat16 if self.precision == "bf16" else torch.float16)
        self.module.scalar_remainders.copy_(exact - rounded)

    @property
    def loss_scale(self) -> float:
        """What the loss, and so gradients, are multiplied by while fp16 has them."""
        return float(self.deepspeed.optimizer.loss_scale)

    def release(self) -> None:
        """Give back the memory of weights, gradients, optimiser state. The engine cannot be used any more."""
        from deepspeed.runtime.zero import parameter_offload

        optimizer = self.deepspeed.optimizer
        self.deepspeed.destroy()
        # ZeRO stage 3 ties parameters, optimiser and autograd nodes into cycles that Python's collector cannot see
        # through, and keeps every model in this list: so what holds memory is taken away from them
        parameter_offload.FWD_MODULE_STACK.clear()
        self._optimizer.state.clear()
        self._optimizer.param_groups.clear()
        optimizer.__dict__.clear()
        for parameter in self.module.parameters():
            parameter.__dict__.clear()
            parameter.data, parameter.grad = parameter.new_empty(0), None


def make_engine(clip: CLIP, recipe: Recipe, config: dict[str, Any], ranks: Ranks) -> Engine:
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
    scalars = {name: value.detach().clone() for name, value in clip.named_parameters(recurse=False)}
    frozen = {}
    if ranks.is_main and precision_of(config) in ("bf16", "fp16"):
        still = [(name, value) for name, value in clip.named_parameters() if not value.requires_grad]
        frozen = {name: value.detach().to("cpu", torch.float32, copy=True) for name, value in still}
    with contextlib.redirect_stdout(None):  # one of its optimizers prints how much memory there is
        deepspeed_engine, _, _, _ = deepspeed.initialize(model=clip, optimizer=optimizer, config=config)
    engine = Engine(deepspeed_engine, precision_of(config), frozen)
    engine.set_scalars(scalars)
    return engine


def _make_optimizer(clip: CLIP, section: OptimizerSection, config: dict[str, Any]) -> Optimizer:
    if section.name != "deepspeed_adamw":
        return make_optimizer(clip, section)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    # both are AdamW unless told otherwise, and compiled at their first start on a machine, which takes minutes
    kind = asking_first(DeepSpeedCPUAdam if offload_device(config, "optimizer") == "cpu" else FusedAdam)
    betas = (section.beta1, section.beta2)
    optimizer: Optimizer = kind(parameter_groups(clip, section), lr=section.lr, betas=betas, eps=section.eps)
    return optimizer


def asking_first(kind: type[Optimizer]) -> Any:
    """An optimizer that heeds `grad_scale` and `found_inf`, as torch's fused ones do; the host waits for them."""

    class AskingFirst(kind):  # type: ignore[valid-type, misc]
        def step(self, *args: Any, **kwargs: Any) -> None:
            if self.found_inf.item():
                return
            if self.grad_scale is not None:
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.div_(self.grad_scale)
            super().step(*args, **kwargs)

    return AskingFirst


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
