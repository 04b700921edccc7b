"""What is measured closely, at logged steps or where asked for: norms, accuracy in the batch, phases, memory, traces.

B pairs of a micro-batch, D columns of a feature, R rows of a block
T towers, 3 sums of squares: gradients, weights, updates
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from model.clip import CLIPOutput
from pipeline.ranks import Ranks
from pipeline.training.engines.engine import Engine
from pipeline.training.engines.fragments import find_fragments
from pipeline.training.side_files import Unwritable

PHASES = ("data", "masks", "forward", "loss", "backward", "update")
# First parts of parameters' names; what is in no tower, temperature and bias, has a norm of its own.
_TOWERS = {"visual": "image", "text": "text"}
TOWERS = (*_TOWERS.values(), "temperature")
_GRADIENT, _WEIGHT, _UPDATE = range(3)
_ACCURACY_ROWS = 1024
PROFILE = "profile"
_PROFILE_ROWS = 30


class StepObserver:
    """Watches one step, from when it is made; `read` waits for the device."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._clock = PhaseClock(ranks.device)
        self._accuracies: list[Tensor] = []

    def end(self, phase: str) -> None:
        """What happened since the phase before was this one."""
        self._clock.end(phase)

    def see_features(self, output: CLIPOutput) -> None:
        """Those of a micro-batch."""
        self._accuracies.append(torch.stack(batch_accuracy(output.image_features, output.text_features)))

    def before_update(self, engine: Engine) -> None:
        """Gradients are averaged, weights as they were."""
        self._norms = TowerNorms(engine, self._ranks)

    def after_update(self) -> None:
        """Weights are new."""
        self._norms.after_update()

    def read(self, grad_norm: float | None) -> dict[str, Any]:
        """What was measured of the step. Collective; waits for the device.

        grad_norm: of all gradients, before clipping
        """
        accuracies: dict[str, float] = {}
        if self._accuracies:  # of pairs
            accuracy_2 = self._ranks.mean(torch.stack(self._accuracies).mean(0)).tolist()
            accuracies = dict(zip(("batch_image_accuracy", "batch_text_accuracy"), accuracy_2, strict=True))
        return {**self._norms.read(grad_norm), **self._clock.read(), **accuracies}


def memory_peak_bytes(device: torch.device) -> int:
    """Of this rank: of the device since it was asked last, or of the process since its start."""
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak_bytes
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class PhaseClock:
    """Where the time of a step goes: stretches between marks, on the device's own clock where it has one.

    Work that is still queued on a GPU when the step begins belongs to its first phase.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [("", self._now())]

    def end(self, phase: str) -> None:
        """What happened since the mark before was this phase."""
        self._marks.append((phase, self._now()))

    def read(self) -> dict[str, float]:
        """Share of the time so far that each phase took. Waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = dict.fromkeys(PHASES, 0.0)
        for (_, before), (phase, after) in pairwise(self._marks):
            seconds[phase] += _seconds_between(before, after)
        total_s = sum(seconds.values())
        return {f"{phase}_share": value / total_s for phase, value in seconds.items()} if total_s else {}

    def _now(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds_between(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    if isinstance(before, float) or isinstance(after, float):
        assert isinstance(before, float)
        assert isinstance(after, float)
        return after - before
    return float(before.elapsed_time(after)) / 1000


class TowerNorms:
    """Norms of gradients, weights and updates of each tower, from what every rank's optimizer updates anyway.

    Made between a step's last backward pass and its update, when activations are gone: it keeps a copy of the weights.
    """

    def __init__(self, engine: Engine, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums_T3 = torch.zeros(len(TOWERS), 3, device=ranks.device)
        self._fragments = list(find_fragments(engine.deepspeed).values())
        holders = {id(fragment.holder): fragment.holder for fragment in self._fragments}
        self._before = {number: holder.detach().clone() for number, holder in holders.items()}
        self._add(_WEIGHT, self._before)
        gradients = engine.gradients()
        self._add(_GRADIENT, {id(holder): torch.cat([x.reshape(-1) for x in pieces]) for holder, pieces in gradients})

    def after_update(self) -> None:
        """The update is what changed against the copy."""
        holders = {id(fragment.holder): fragment.holder.detach() for fragment in self._fragments}
        torch._foreach_sub_([*self._before.values()], [holders[number] for number in self._before])
        self._add(_UPDATE, self._before)
        self._before = {}

    def read(self, grad_norm: float | None) -> dict[str, float]:
        """Norms over all ranks. Collective; waits for the device.

        grad_norm: of all gradients, before clipping and without loss scaling; the towers' have their shares of it
        """
        if self._ranks.world_size > 1:
            dist.all_reduce(self._sums_T3)
        total = float(self._sums_T3[:, _GRADIENT].sum())
        norms: dict[str, float] = {}
        for tower, (gradient, weight, update) in zip(TOWERS, self._sums_T3.tolist(), strict=True):
            if grad_norm is not None and total > 0:
                norms[f"grad_norm_{tower}"] = grad_norm * (gradient / total) ** 0.5
            norms[f"weight_norm_{tower}"] = weight**0.5
            norms[f"update_norm_{tower}"] = update**0.5
        return norms

    def _add(self, column: int, tensors: Mapping[int, Tensor]) -> None:
        """Of the fragments of these tensors, by the holders whose shape they have: one kernel for many."""
        for number, tower in enumerate(TOWERS):
            fragments = [f for f in self._fragments if _tower(f.name) == tower and id(f.holder) in tensors]
            if not fragments:
                continue
            parts = [fragment.of_holder(tensors[id(fragment.holder)]) for fragment in fragments]
            square = torch.stack(torch._foreach_norm(parts, 2, torch.float32)).square().sum()
            # without ZeRO every rank has all of it
            self._sums_T3[number, column] = square if fragments[0].is_only_copy else square / self._ranks.world_size


def _tower(name: str) -> str:
    """Which of TOWERS a parameter belongs to."""
    return _TOWERS.get(name.partition(".")[0], TOWERS[-1])


@torch.no_grad()
def batch_accuracy(image_features_BD: Tensor, text_features_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Share of images whose caption, and of captions whose image, is the nearest of the B; never B x B at once."""
    return _found(image_features_BD, text_features_BD), _found(text_features_BD, image_features_BD)


def _found(queries_BD: Tensor, candidates_BD: Tensor) -> Tensor:
    hits = []
    for start in range(0, len(queries_BD), _ACCURACY_ROWS):
        scores_RB = queries_BD[start : start + _ACCURACY_ROWS] @ candidates_BD.T
        hits.append(scores_RB.argmax(1) == torch.arange(start, start + len(scores_RB), device=scores_RB.device))
    return torch.cat(hits).float().mean()


class ProfileWindow:
    """A trace of some steps by torch's profiler, for chrome://tracing or ui.perfetto.dev, and a table of operators.

    steps: `first` to `last`, counted from 1 as the log does; None: nothing
    """

    def __init__(self, steps: tuple[int, int] | None, run_directory: Path, ranks: Ranks) -> None:
        self._steps = steps if ranks.is_main else None  # ranks do the same: one trace is enough
        self._directory = run_directory / PROFILE
        self._is_cuda = ranks.device.type == "cuda"
        self._profiler: profile | None = None

    def before(self, step: int) -> None:
        """Start if this is the first of the steps."""
        if self._steps is not None and step == self._steps[0]:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
            self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profiler.start()

    def after(self, step: int) -> None:
        """Stop and write if this was the last of them."""
        if self._profiler is None or self._steps is None or step < self._steps[1]:
            return
        if self._is_cuda:
            torch.cuda.synchronize()
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        try:
            trace = self._write(profiler, self._directory / f"steps_{self._steps[0]}_to_{self._steps[1]}.json.gz")
        except OSError as error:
            Unwritable(self._directory, "the trace is lost").say(error)
        else:
            print(f"trace of the steps in {trace}", flush=True)

    def _write(self, profiler: profile, trace: Path) -> Path:
        self._directory.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
        by = "self_device_time_total" if self._is_cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=by, row_limit=_PROFILE_ROWS)
        trace.with_suffix("").with_suffix(".txt").write_text(table)
        return trace
