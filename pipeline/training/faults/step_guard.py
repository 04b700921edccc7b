"""A step whose loss or gradients are not finite changes nothing, on no rank; and which samples it held.

Decided on the device. A loss that is not finite makes its gradients so; the norm of the gradients, which DeepSpeed
takes over all ranks, then is not finite anywhere; and an optimizer that is told so leaves weights and state as they
were. The host reads later what happened.

B pairs of a micro-batch, D columns of a feature, S steps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.training.engines.gradient_norm import gradient_norm

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class StepOutcome:
    """What became of a step, the same on all ranks: `loss` is the whole batch's, `skipped` that it changed nothing.

    For skipped steps:
    suspects: samples of this rank whose features were not finite, or all of its samples if no rank had such
    features_finite: whether no rank had such
    """

    step: int
    loss: float
    skipped: bool
    suspects: tuple[str, ...] = ()
    features_finite: bool = True


@dataclass(frozen=True)
class _Step:
    """A step's outcome before the host has read it. outcome_2: this rank's loss, and 1 if the step was skipped."""

    number: int
    outcome_2: Tensor
    finite_B: Tensor
    keys: list[str]


def spread_non_finite(loss: Tensor) -> Tensor:
    """The loss itself, to be differentiated: where it is not finite all its gradients are NaN, otherwise unchanged."""
    return loss + 0 * loss.detach() * loss


class StepGuard:
    """Watches over an engine's updates; only `read` waits for the device."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks) -> None:
        self._engine = engine
        self._ranks = ranks
        self._skip: Tensor | None = None
        self._finite: list[Tensor] = []
        self._unread: list[_Step] = []
        self._hooks = [
            engine.basic_optimizer.register_step_pre_hook(self._before_update),
            engine.module.register_forward_hook(self._after_forward),
        ]

    def end_step(self, number: int, loss: Tensor, batches: Sequence[Batch]) -> Tensor:
        """Note a step that was taken; whether it was skipped, as 0 or 1 on the device.

        number: of steps taken so far, this one included
        loss: of this rank, mean over micro-batches
        """
        # some of DeepSpeed's optimizers look at the norm themselves (docs/reliability.md) and then do not ask ours
        skipped = torch.ones_like(loss) if self._skip is None else self._skip
        keys = [key for batch in batches for key in batch.keys]
        self._unread.append(_Step(number, torch.stack((loss.detach(), skipped)), torch.cat(self._finite), keys))
        self._skip, self._finite = None, []
        return skipped

    def read(self) -> list[StepOutcome]:
        """The outcomes of all steps since the last time, in order. Collective; waits for the device."""
        steps, self._unread = self._unread, []
        if not steps:
            return []
        outcomes_S2 = self._ranks.mean(torch.stack([step.outcome_2 for step in steps])).tolist()
        return [self._outcome(step, *outcome) for step, outcome in zip(steps, outcomes_S2, strict=True)]

    def forget(self) -> None:
        """Steps that nobody has read yet are of no interest any more."""
        self._unread = []

    def close(self) -> None:
        """Let go of the engine."""
        for hook in self._hooks:
            hook.remove()

    def _outcome(self, step: _Step, loss: float, skipped: float) -> StepOutcome:
        # in fp16 DeepSpeed skips steps until it has found a loss scale: nothing is wrong with those
        if not skipped or (self._engine.fp16_enabled() and math.isfinite(loss)):
            return StepOutcome(step.number, loss, False)
        suspects = [key for key, finite in zip(step.keys, step.finite_B.tolist(), strict=True) if not finite]
        features_finite = not self._ranks.any(bool(suspects))
        return StepOutcome(step.number, loss, True, tuple(step.keys if features_finite else suspects), features_finite)

    def _after_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            sums_B = output.image_features.detach().sum(-1) + output.text_features.detach().sum(-1)
            self._finite.append(sums_B.isfinite())

    def _before_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before each of the optimizer's steps; ZeRO makes one for every group of parameters."""
        skip = self._skip = (~gradient_norm(self._engine, optimizer).isfinite()).float()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = skip  # type: ignore[attr-defined]  # torch's fused optimizers look at it on the device
        elif skip.item():  # others cannot, and the host waits
            for parameter in _parameters(optimizer):
                parameter.grad = None


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
