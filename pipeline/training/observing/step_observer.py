"""What is measured closely at logged steps, and only there: norms, accuracy within the batch, phases, memory."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.ranks import Ranks
from pipeline.training.observing.batch_accuracy import batch_accuracy
from pipeline.training.observing.phase_clock import PhaseClock
from pipeline.training.observing.tower_norms import TowerNorms

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class StepObserver:
    """Watches the step between `begin` and `read`; a step without `begin` costs nothing."""

    def __init__(self, engine: DeepSpeedEngine, ranks: Ranks) -> None:
        self.clock = PhaseClock(ranks.device)
        self._ranks = ranks
        self._norms = TowerNorms(engine, ranks)
        self._is_on = False
        self._accuracies: list[Tensor] = []
        self._hook = engine.module.register_forward_hook(self._after_forward)

    def begin(self) -> None:
        """Watch the step that comes next."""
        self._is_on = True
        self._norms.begin()
        self.clock.begin()

    def read(self, grad_norm: float | None) -> dict[str, Any]:
        """What was measured of the step; without `begin`, memory alone. Collective; waits for the device.

        grad_norm: of all gradients, before clipping
        """
        figures: dict[str, Any] = {}
        if self._is_on:
            figures |= self._norms.read(grad_norm) | self.clock.read()
            if self._accuracies:
                accuracy_2 = self._ranks.mean(torch.stack(self._accuracies).mean(0)).tolist()
                figures |= dict(zip(("batch_image_accuracy", "batch_text_accuracy"), accuracy_2, strict=True))
        self._is_on, self._accuracies = False, []
        return figures | self._memory()

    def close(self) -> None:
        """Let go of the engine."""
        self._norms.close()
        self._hook.remove()

    def _after_forward(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._is_on and torch.is_grad_enabled():
            self._accuracies.append(torch.stack(batch_accuracy(output.image_features, output.text_features)))

    def _memory(self) -> dict[str, int]:
        """Peak of this rank: of the device since the last line, or of the process since its start."""
        if self._ranks.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._ranks.device)
            torch.cuda.reset_peak_memory_stats(self._ranks.device)
            return {"memory_peak_bytes": peak}
        return {"memory_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
