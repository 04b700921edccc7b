"""Training one stage: its engine, its data, its loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.clip import CLIP
from pipeline.data.captions import Tokenizer
from pipeline.data.data_loader import Batch
from pipeline.data.training_data import TrainingData
from pipeline.ranks import Ranks
from pipeline.training.checkpoints.checkpoint import TrainingState, checkpoint_directory, newest_checkpoint
from pipeline.training.checkpoints.checkpoint_writer import CheckpointWriter, SaveSchedule
from pipeline.training.checkpoints.resume import restore
from pipeline.training.faults.agreement import RankCheck, StepVote
from pipeline.training.faults.guard import BadSamples, FaultLog, StepGuard
from pipeline.training.faults.liveness import StopRequest, Watchdog
from pipeline.training.live_evaluation import LiveEvaluation
from pipeline.training.observing.metrics import MetricsWindow
from pipeline.training.observing.run_logger import RunLogger, timestamp
from pipeline.training.observing.step_observer import ProfileWindow, StepObserver, memory_peak_bytes
from pipeline.training.progress import Progress
from pipeline.training.stage_data import StageData
from pipeline.training.stage_plan import Stage
from pipeline.training.train_step import make_learner, train_step


@dataclass(frozen=True)
class RunContext:
    """What the stages of a run share."""

    directory: Path
    ranks: Ranks
    data: TrainingData
    tokenizer: Tokenizer
    bad_samples: BadSamples
    fault_log: FaultLog
    checkpoints: CheckpointWriter
    evaluation: LiveEvaluation
    profiler: ProfileWindow
    stop: StopRequest
    watchdog: Watchdog
    start_s: float

    def print(self, text: str) -> None:
        """A line for whoever watches, from the main rank."""
        if self.ranks.is_main:
            print(text, flush=True)


class StageTrainer:
    """Everything one stage needs, made once; `train` is the loop."""

    def __init__(self, stage: Stage, clip: CLIP, config: dict[str, Any], run: RunContext) -> None:
        self._stage = stage
        self._recipe = stage.recipe
        self._run = run
        self._ranks = run.ranks
        self._data = StageData(stage, run.data, run.tokenizer, run.ranks)
        learner = self._learner = make_learner(stage, clip, config, run.ranks)
        faults = stage.recipe.faults
        rank_check = RankCheck(clip, faults.compare_ranks_every_steps, run.ranks)
        self._guard = StepGuard(faults, rank_check, run.fault_log, learner.engine.precision == "fp16", run.ranks)
        self._state = TrainingState(
            learner.engine,
            stage.masking,
            weights=(learner.masks, *([learner.average] if learner.average else [])),
            counters=(self._guard.policy, run.bad_samples),
        )
        self._progress = stage.reached(stage.first_step)
        self._vote = StepVote(run.ranks)

    def resume(self, checkpoint: Path, progress: Progress) -> None:
        """Go on from a checkpoint within this stage."""
        restore(self._state, checkpoint, self._ranks)
        self._progress = progress

    def train(self, logger: RunLogger | None) -> Progress:
        """Train to the stage's end, or for two more steps when a rank is asked to stop; saved either way."""
        batches = self._data.batches(self._progress.step)
        schedule = SaveSchedule(self._recipe.train, self._ranks)
        self._window = MetricsWindow(self._stage, self._ranks)
        while self._progress.step < self._stage.end_step:
            step = self._progress.step
            lr, progress = self._stage.learning_rate(step), self._stage.progress(step)
            self._learner.engine.set_learning_rate(lr)
            is_watched = self._recipe.log.watch_steps and self._has_line(step + 1)
            observer = StepObserver(self._ranks) if is_watched else None
            self._run.profiler.before(step + 1)

            wait_start_s = time.perf_counter()
            micro_batches = self._next_batches(batches)
            data_wait_s = time.perf_counter() - wait_start_s
            report = train_step(self._learner, micro_batches, step, progress, self._stage.num_taught(step), observer)
            self._window.add(report, data_wait_s)
            self._guard.note(step + 1, report, micro_batches)
            problems = [problem for batch in micro_batches for problem in batch.problems]
            self._run.bad_samples.note(problems, samples_read=self._stage.batches.global_batch_size)
            self._progress = self._stage.reached(step + 1)
            if self._ranks.is_main:
                self._data.say_coverage(step)
            self._run.profiler.after(step + 1)
            self._run.watchdog.beat()

            stops = self._vote.cast(step + 1, self._progress.samples_seen, stop=bool(self._run.stop))
            ends = stops or step + 1 == self._stage.end_step
            is_logged = ends or self._has_line(step + 1)
            if is_logged:
                self._log(lr, logger, observer)
            if ends or schedule.is_due(step + 1, is_logged):
                self._check_steps()  # no checkpoint holds a step that nobody has looked at
                self._save(must_succeed=ends)
                schedule.saved()
            if stops:
                break
        self._vote.close()
        return self._progress

    def close(self) -> None:
        """Give back the memory of model, optimiser and gradients, for the next stage's."""
        self._learner.engine.release()
        del self._learner, self._guard, self._state
        gc.collect()
        # of compiled functions torch keeps eight versions at most, and the next stage may have other shapes
        torch.compiler.reset()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _next_batches(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the step that comes next."""
        return [next(batches) for _ in range(self._stage.batches.accumulation_steps)]

    def _has_line(self, step: int) -> bool:
        """Whether metrics are due after so many steps."""
        is_last = step == self._stage.end_step
        return is_last or step % self._recipe.train.log_every_steps == 0 or self._is_evaluated(step)

    def _is_evaluated(self, step: int) -> bool:
        """After so many steps; masked words also at their stage's end, where nobody can look later: the head goes."""
        ends_words = self._stage.masks_words and step == self._stage.end_step
        return self._run.evaluation.is_due(step, at_least=ends_words)

    def _log(self, lr: float, logger: RunLogger | None, observer: StepObserver | None) -> None:
        """A line of metrics; stops the run if it shows what must not be. Collective."""
        metrics = self._metrics(lr, observer)
        if self._is_evaluated(self._progress.step):
            metrics |= self._evaluate()
        if logger:
            logger.log(metrics)
        self._run.bad_samples.check(metrics["bad_samples"])  # every rank sees the same figures
        self._check_steps()

    def _metrics(self, lr: float, observer: StepObserver | None) -> dict[str, Any]:
        """Figures of the steps since the last line, over all ranks. Waits for the device."""
        step, window, curriculum = self._progress.step, self._window, self._stage.curriculum
        figures = window.close()
        self._window = MetricsWindow(self._stage, self._ranks)
        by_set = self._data.samples_seen_by_set(step)
        return {
            "step": step,
            **({} if self._stage.name is None else {"stage": self._stage.name}),
            "epoch": self._stage.passes(step),
            "samples_seen": self._progress.samples_seen,
            **({"samples_seen_by_set": by_set} if by_set else {}),
            **figures,
            **({} if curriculum is None else {"concept_stage": curriculum.stage(self._stage.samples(step - 1))}),
            "bad_samples": self._run.bad_samples.total(),
            "lr": lr,
            **(observer.read(figures["grad_norm"]) if observer else {}),
            "memory_peak_bytes": memory_peak_bytes(self._ranks.device),
            "save_s": window.save_s,
            "save_share": self._run.checkpoints.total_save_s / (time.perf_counter() - self._run.start_s),
            "wall_time_s": time.perf_counter() - self._run.start_s,
            "time": timestamp(),
        }

    def _evaluate(self) -> dict[str, float]:
        start_s = time.perf_counter()
        with self._run.watchdog.patient(), self._window.paused():
            figures = self._run.evaluation.figures(self._learner.engine.module, self._stage.curriculum)
        return figures | {"evaluation_s": time.perf_counter() - start_s}

    def _check_steps(self) -> None:
        if self._guard.must_roll_back(self._progress.step):
            self._roll_back()

    def _roll_back(self) -> None:
        """Weights and all that follows them as in the last checkpoint; data, steps, schedules and counters go on."""
        checkpoint = self._ranks.from_main(lambda: newest_checkpoint(self._run.directory))
        if checkpoint is None or checkpoint == checkpoint_directory(self._run.directory, self._stage.first_step):
            self._run.print("no checkpoint of this stage to roll back to: going on")
            return
        restore(self._state, checkpoint, self._ranks, with_counters=False)
        self._guard.policy.rolled_back(self._progress.step)
        self._run.print(
            f"rolled back to the weights of {checkpoint}; data and steps go on from step {self._progress.step:,}"
        )
        self._save(must_succeed=False)  # the way back is not taken again by a run that is interrupted now

    def _save(self, must_succeed: bool) -> None:
        with self._run.watchdog.patient(), self._window.saving():
            self._run.checkpoints.save(self._state, self._progress, must_succeed)
