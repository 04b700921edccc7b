"""Where faults are said: a line each on the terminal, and in faults_rankR.jsonl with the samples they concern."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.ranks import Ranks
from pipeline.training.faults.fault_policy import Fault
from pipeline.training.side_files import LineFile

_SAMPLES_SHOWN = 3


class FaultLog:
    """Those of one rank; it names its own samples, and the main rank also says what happened to all."""

    def __init__(self, run_directory: Path, ranks: Ranks) -> None:
        self._lines = LineFile(run_directory / f"faults_rank{ranks.rank}.jsonl")
        self._ranks = ranks

    def note(self, faults: Iterable[Fault]) -> None:
        """What was found since the last time; none is fine, and what could not be written then is tried again."""
        lines = [line for line in map(self._say, faults) if line is not None]
        self._lines.append(*map(json.dumps, lines))

    def _say(self, fault: Fault) -> dict[str, Any] | None:
        """A line on the terminal; returns what this rank has to write down of it."""
        outcome = fault.outcome
        if self._ranks.is_main:
            print(f"warning: {fault.text}", flush=True)
        if outcome.suspects and not outcome.features_finite:
            shown = ", ".join(outcome.suspects[:_SAMPLES_SHOWN])
            more = f" and {len(outcome.suspects) - _SAMPLES_SHOWN} more" * (len(outcome.suspects) > _SAMPLES_SHOWN)
            print(f"warning: rank {self._ranks.rank}: not finite in step {outcome.step:,}: {shown}{more}", flush=True)
        if not (outcome.suspects or self._ranks.is_main):
            return None
        return {
            "step": outcome.step,
            "kind": fault.kind,
            "action": fault.action,
            # JSON knows neither infinity nor NaN
            "loss": outcome.loss if math.isfinite(outcome.loss) else str(outcome.loss),
            "samples": list(outcome.suspects),
        }
