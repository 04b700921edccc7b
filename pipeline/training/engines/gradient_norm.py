"""The norm of all gradients on all ranks, and clipping by it, on the device; DeepSpeed would make the host wait.

Which stages it still makes wait is in ds_configs/README.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def gradient_norm(engine: DeepSpeedEngine, optimizer: Optimizer) -> Tensor:
    """Of the gradients that the optimizer is about to apply, scalar; infinite or NaN where one of them is."""
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    return _norm(_gradients(optimizer)) if norm is None else torch.as_tensor(norm, dtype=torch.float32)


def clip_gradients(engine: DeepSpeedEngine, max_norm: float) -> None:
    """From now on every update is made with gradients whose norm over all ranks is at most `max_norm`; 0: any.

    Their norm before that is what the engine's `get_global_grad_norm` gives after each update, at every ZeRO stage.
    """
    if engine.optimizer is engine.basic_optimizer:
        _measure_all(engine.basic_optimizer)
    elif getattr(engine.optimizer, "compute_grad_norm", True) is False:
        _measure_shares(engine.optimizer, engine.basic_optimizer)

    def clip(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each of the optimizer's steps; ZeRO makes one for every group of parameters."""
        scale = (gradient_norm(engine, optimizer) / max_norm).clamp(min=1.0)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.grad_scale = scale  # type: ignore[attr-defined]  # torch's fused optimizers divide by it
        else:
            torch._foreach_div_(_gradients(optimizer), scale)

    if max_norm:
        engine.basic_optimizer.register_step_pre_hook(clip)


def _measure_all(optimizer: Optimizer) -> None:
    """What DeepSpeed keeps nowhere (without ZeRO): the norm, of averaged gradients that every rank has all of."""

    def publish(*_: Any) -> None:
        optimizer._global_grad_norm = _norm(_gradients(optimizer))  # type: ignore[attr-defined]  # DeepSpeed looks there

    optimizer.register_step_pre_hook(publish)


def _measure_shares(zero: Any, optimizer: Optimizer) -> None:
    """What DeepSpeed was told not to compute (ZeRO stages 1 and 2): the norm, before the first group is updated."""
    update = zero.step
    norms: list[Tensor] = []

    def step() -> None:
        norm = _norm(gradient for group in zero.averaged_gradients.values() for gradient in group)
        square = norm.square()
        dist.all_reduce(square)
        norms[:] = [square.sqrt()]
        update()

    def publish(*_: Any) -> None:
        (zero._global_grad_norm,) = norms  # where DeepSpeed's own would be, which `step` has just cleared

    zero.step = step
    optimizer.register_step_pre_hook(publish)


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    """In fp32, whatever the gradients are in."""
    norms = torch._foreach_norm(list(gradients), 2, torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
