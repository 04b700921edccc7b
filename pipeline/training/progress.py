"""How far a run has come: all that resuming needs beside weights and optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StageStart:
    """Where a stage began: steps and samples of the run before it, and its pairs per step then.

    A run that goes on at another world size may have other batches; what depends on a stage's length, its end and
    its schedules, is counted in batches of this size.
    """

    step: int
    samples_seen: int
    global_batch_size: int


@dataclass(frozen=True)
class Progress:
    """Steps and samples so far, the stage that took the last of them (its name, if any), and the stages begun."""

    step: int
    samples_seen: int
    stage: str | None = None
    stage_starts: tuple[StageStart, ...] = ()

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Progress:
        """From the fields that `dataclasses.asdict` gives; raises KeyError or TypeError if one is missing."""
        starts = tuple(StageStart(**start) for start in record["stage_starts"])
        return cls(record["step"], record["samples_seen"], record.get("stage"), starts)
