"""All that watches over the steps of a stage; what it decides is the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from formats.errors import UserError
from pipeline.data.data_loader import Batch
from pipeline.ranks import Ranks
from pipeline.recipe import FaultsSection
from pipeline.training.faults.fault_log import FaultLog
from pipeline.training.faults.fault_policy import FaultPolicy
from pipeline.training.faults.rank_check import RankCheck
from pipeline.training.faults.step_guard import StepGuard

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class FaultWatch:
    """Notes every step without waiting for the device, and judges them when `judge` is called."""

    def __init__(self, engine: DeepSpeedEngine, section: FaultsSection, log: FaultLog, ranks: Ranks) -> None:
        self.policy = FaultPolicy(section)  # a checkpoint keeps what it remembers
        self._guard = StepGuard(engine, ranks)
        self._rank_check = RankCheck(engine.module, section.compare_ranks_every_steps, ranks)
        self._log = log

    def end_step(self, step: int, loss: Tensor, batches: Sequence[Batch]) -> Tensor:
        """Note a step that was taken, with its loss on this rank; 1 on the device if it was skipped, else 0."""
        return self._guard.end_step(step, loss, batches)

    def judge(self, step: int) -> bool:
        """Whether to roll back, after what happened since the last time; raises UserError to stop. Collective.

        step: how many steps were taken
        """
        faults = self.policy.judge(self._guard.read())
        self._log.note(faults)
        self._rank_check.look(step)
        worst = {fault.action: fault for fault in faults}
        if "stop" in worst:
            raise UserError(f"{worst['stop'].text}; nothing is saved, the last checkpoint is intact")
        return "roll_back" in worst

    def close(self) -> None:
        """Let go of the engine."""
        self._guard.close()
