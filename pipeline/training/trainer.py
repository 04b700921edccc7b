"""Training one stage: its engine, its data, its loop."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from formats.errors import UserError
from model.clip import CLIP
from pipeline.data.coverage import describe_coverage
from pipeline.data.data_loader import Batch, MicroBatches, TrainingSet, make_loader
from pipeline.data.shard_cache import make_cache
from pipeline.data.shard_reader import ShardReader
from pipeline.data.text_masking import TextMasker
from pipeline.data.tokenizer import Tokenizer
from pipeline.data.training_data import TrainingData
from pipeline.ranks import Ranks
from pipeline.training.checkpoints.checkpoint import Carried, TrainingState, checkpoint_directory, newest_checkpoint
from pipeline.training.checkpoints.checkpoint_writer import CheckpointWriter
from pipeline.training.checkpoints.resume import restore
from pipeline.training.checkpoints.save_schedule import SaveSchedule
from pipeline.training.engines.engine import make_engine, release
from pipeline.training.engines.engine_config import precision_of
from pipeline.training.engines.optimizer import learning_rate, set_learning_rate
from pipeline.training.engines.weight_average import WeightAverage
from pipeline.training.faults.bad_samples import BadSamples
from pipeline.training.faults.fault_log import FaultLog
from pipeline.training.faults.fault_watch import FaultWatch
from pipeline.training.faults.step_vote import StepVote
from pipeline.training.faults.stop_request import StopRequest
from pipeline.training.faults.watchdog import Watchdog
from pipeline.training.mask_drawer import MaskDrawer
from pipeline.training.objectives.objective import make_objective
from pipeline.training.observing.live_evaluation import LiveEvaluation
from pipeline.training.observing.metrics_window import MetricsWindow
from pipeline.training.observing.profile_window import ProfileWindow
from pipeline.training.observing.run_logger import RunLogger, timestamp
from pipeline.training.observing.step_metrics import report_of, speeds
from pipeline.training.observing.step_observer import StepObserver
from pipeline.training.progress import Progress
from pipeline.training.stage_plan import Stage
from pipeline.training.train_step import train_step
from pipeline.training.weights.stage_model import speed_up


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
        self._plan = stage.batches
        self._run = run
        self._ranks = run.ranks
        self._order = run.data.order(stage.recipe.data, stage.seed)
        speed_up(clip, stage)
        self._engine = make_engine(clip, stage.recipe, config, run.ranks)
        self._masks = MaskDrawer(stage.masking, clip.visual, stage.model.vision.patch_size, stage.seed, run.ranks)
        self._objective = make_objective(stage.recipe.loss, run.ranks)
        self._faults = FaultWatch(self._engine, stage.recipe.faults, run.fault_log, run.ranks)
        decay = stage.recipe.optimizer.ema_decay
        self._averages = [] if decay is None else [WeightAverage(self._engine, decay, run.ranks)]
        carried: tuple[Carried, ...] = (self._masks, self._faults.policy, run.bad_samples, *self._averages)
        self._state = TrainingState(self._engine, precision_of(config), stage.masking, carried)
        self._progress = stage.reached(stage.first_step)
        self._vote = StepVote(run.ranks)
        self._observer = StepObserver(self._engine, run.ranks)

    def resume(self, checkpoint: Path, progress: Progress) -> None:
        """Go on from a checkpoint within this stage."""
        restore(self._state, checkpoint, self._ranks)
        self._progress = progress

    def train(self, logger: RunLogger | None) -> Progress:
        """Train to the stage's end, or for two more steps when a rank is asked to stop; saved either way."""
        batches = self._batches()
        window = MetricsWindow(self._ranks)
        schedule = SaveSchedule(self._recipe.train, self._ranks)
        while self._progress.step < self._stage.end_step:
            step = self._progress.step
            lr = learning_rate(self._stage.schedule_step(step), self._stage.schedule_steps, self._recipe.optimizer)
            set_learning_rate(self._engine.optimizer.param_groups, lr)
            if self._recipe.log.watch_steps and self._has_line(step + 1):
                self._observer.begin()
            self._run.profiler.before(step + 1)

            micro_batches = window.timed_fetch(batches, self._plan.accumulation_steps)
            self._observer.clock.end("data")
            report = train_step(
                self._engine,
                micro_batches,
                self._masks,
                self._objective,
                self._ranks,
                step,
                self._stage.progress(step),
                self._observer.clock,
            )
            for average in self._averages:
                average.follow(step + 1 - self._stage.first_step)
            window.add(report, self._faults.end_step(step + 1, report[0], micro_batches))
            problems = [problem for batch in micro_batches for problem in batch.problems]
            self._run.bad_samples.note(problems, samples_read=self._plan.global_batch_size)
            self._progress = self._stage.reached(step + 1)
            self._report_coverage(step)
            trace = self._run.profiler.after(step + 1)
            if trace:
                self._run.print(f"trace of the steps in {trace}")
            self._run.watchdog.beat()

            stops = self._vote.cast(step + 1, self._progress.samples_seen, stop=bool(self._run.stop))
            ends = stops or step + 1 == self._stage.end_step
            is_logged = ends or self._has_line(step + 1)
            if is_logged:
                self._log(window, lr, logger)
                window = MetricsWindow(self._ranks)
            if ends or schedule.is_due(step + 1, is_logged):
                self._judge_steps()  # no checkpoint holds a step that nobody has looked at
                self._save(must_succeed=ends)
                schedule.saved()
            if stops:
                break
        self._vote.close()
        return self._progress

    def close(self) -> None:
        """Give back the memory of model, optimiser and gradients, for the next stage's."""
        self._faults.close()
        self._observer.close()
        release(self._engine)
        del self._engine, self._masks, self._faults, self._averages, self._state, self._observer
        gc.collect()
        # of compiled functions torch keeps eight versions at most, and the next stage may have other shapes
        torch.compiler.reset()
        if self._ranks.device.type == "cuda":
            torch.cuda.empty_cache()

    def _batches(self) -> Iterator[Batch]:
        captions = TextMasker(self._run.tokenizer, self._recipe.text_masking)
        image_size = self._stage.model.vision.image_size
        data = self._recipe.data
        shards = ShardReader(self._run.data.shards, make_cache(data))
        dataset = TrainingSet(shards, self._order, self._stage.seed, captions, image_size, data.crop_min_area)
        places = MicroBatches(self._plan, self._ranks.rank, self._progress.step, self._stage.end_step)
        loader = make_loader(dataset, places, data.workers, self._ranks.device.type == "cuda")
        try:
            yield from loader
        except UserError as error:
            # a worker's error arrives with its traceback in the message; the last line is ours
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None

    def _report_coverage(self, step: int) -> None:
        """Say what was seen of each epoch that the step completed."""
        size = self._plan.num_samples
        for epoch in range(self._plan.position(step) // size, self._plan.position(step + 1) // size):
            if self._ranks.is_main:
                read = range(epoch * size, (epoch + 1) * size)
                self._run.print(describe_coverage(f"epoch {epoch + 1}", self._run.data, self._order, [read]))

    def _has_line(self, step: int) -> bool:
        """Whether metrics are due after so many steps."""
        is_last = step == self._stage.end_step
        return is_last or step % self._recipe.train.log_every_steps == 0 or self._run.evaluation.is_due(step)

    def _metrics(self, window: MetricsWindow, lr: float) -> dict[str, Any]:
        """Means over the steps since the last log, over all ranks. Waits for the device."""
        means, seconds, data_wait_share = window.close()
        save_s = self._run.checkpoints.take_save_s()
        seconds -= save_s
        *values, bad_samples = self._ranks.mean(
            torch.cat((means, means.new_tensor([self._run.bad_samples.count])))
        ).tolist()
        report = report_of(values)
        norm = self._engine.get_global_grad_norm()
        grad_norm = float(norm) if norm is not None and math.isfinite(norm) else None
        return {
            "step": self._progress.step,
            **({} if self._stage.name is None else {"stage": self._stage.name}),
            "epoch": self._stage.passes(self._progress.step),
            "samples_seen": self._progress.samples_seen,
            **self._samples_seen_by_set(),
            **report,
            "skipped_steps": round(report["skipped_steps"] or 0),
            "bad_samples": self._run.bad_samples.count_before + round(bad_samples * self._ranks.world_size),
            "lr": lr,
            "grad_norm": grad_norm,
            **speeds(self._stage, report, window.steps, seconds, self._ranks),
            "data_wait_share": data_wait_share,
            "seconds_per_step": seconds / window.steps,
            **self._observer.read(grad_norm),
            "save_s": save_s,
            "save_share": self._run.checkpoints.total_save_s / (time.perf_counter() - self._run.start_s),
            "wall_time_s": time.perf_counter() - self._run.start_s,
            "time": timestamp(),
        }

    def _samples_seen_by_set(self) -> dict[str, dict[str, int]]:
        """Nothing where there is one set only."""
        if len(self._run.data.sets) == 1:
            return {}
        counts = self._order.samples_by_set(self._stage.positions(self._progress.step))
        return {"samples_seen_by_set": dict(zip(self._run.data.names, counts, strict=True))}

    def _log(self, window: MetricsWindow, lr: float, logger: RunLogger | None) -> None:
        """A line of metrics; stops the run if it shows what must not be. Collective."""
        metrics = self._metrics(window, lr)
        if self._run.evaluation.is_due(self._progress.step):
            metrics |= self._evaluate()
        if logger:
            logger.log(metrics)
        self._run.bad_samples.check(metrics["bad_samples"])  # every rank sees the same figures
        self._judge_steps()

    def _evaluate(self) -> dict[str, float]:
        start_s = time.perf_counter()
        with self._run.watchdog.patient():
            figures = self._run.evaluation.figures(self._engine)
        return figures | {"evaluation_s": time.perf_counter() - start_s}

    def _judge_steps(self) -> None:
        if self._faults.judge(self._progress.step):
            self._roll_back()

    def _roll_back(self) -> None:
        """Weights and optimiser of the last checkpoint; the place in the data, steps and schedules go on."""
        checkpoint = self._ranks.from_main(lambda: newest_checkpoint(self._run.directory))
        if checkpoint is None or checkpoint == checkpoint_directory(self._run.directory, self._stage.first_step):
            self._run.print("no checkpoint of this stage to roll back to: going on")
            return
        restore(replace(self._state, carried=[self._masks]), checkpoint, self._ranks)
        self._faults.policy.rolled_back(self._progress.step)
        self._run.print(
            f"rolled back to the weights of {checkpoint}; data and steps go on from step {self._progress.step:,}"
        )
        self._save(must_succeed=False)  # the way back is not taken again by a run that is interrupted now

    def _save(self, must_succeed: bool) -> None:
        with self._run.watchdog.patient():
            self._run.checkpoints.save(self._state, self._progress, must_succeed)
