"""A training run from recipe to last checkpoint: its stages one after the other, from wherever it was left."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from formats.errors import UserError
from formats.files import write_json
from pipeline.data.captions import load_tokenizer
from pipeline.data.coverage import describe_reads
from pipeline.data.shard_cache import check_room
from pipeline.data.text_masking import TextMasker
from pipeline.data.training_data import read_training_data
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.training.checkpoints.checkpoint import checkpoint_directory, read_contents
from pipeline.training.checkpoints.checkpoint_writer import CheckpointWriter
from pipeline.training.checkpoints.resume import choose_checkpoint, set_aside_later
from pipeline.training.engines.engine_config import deepspeed_config, precision_of, zero_stage
from pipeline.training.faults.agreement import check_same_start
from pipeline.training.faults.guard import BadSamples, FaultLog
from pipeline.training.faults.liveness import StopRequest, Watchdog
from pipeline.training.live_evaluation import LiveEvaluation
from pipeline.training.observing.run_logger import RunLogger, timestamp
from pipeline.training.observing.step_observer import ProfileWindow
from pipeline.training.progress import Progress
from pipeline.training.run_record import RECORD, check_unchanged, read_record, write_record
from pipeline.training.stage_plan import Stage, describe_stages, plan_stages
from pipeline.training.start_checks import Machine, check_stage, warnings_about, warnings_about_precision
from pipeline.training.trainer import RunContext, StageTrainer
from pipeline.training.weights.stage_model import count_parameters, make_model
from pipeline.training.weights.start_weights import RECORD_KEY, check_start_weights, load_start_weights
from pipeline.versions import versions

# Asks whoever started the run to start it again: EX_TEMPFAIL of sysexits.h, on which slurm/train.sbatch requeues.
EXIT_INTERRUPTED = 75


def train(recipe: Recipe, ranks: Ranks, plan_warnings: Callable[[Sequence[Stage], torch.device], Sequence[str]]) -> int:
    """Train alone in the run directory; returns the exit code. Raises UserError that names whoever is at work there.

    plan_warnings: what to say of the planned stages on a device, printed before training begins
    """
    if not recipe.train.output:
        raise UserError("no run directory: give train.output=DIRECTORY")
    with ranks.owning(Path(recipe.train.output), "is being trained", "choose another train.output"):
        training = TrainingRun(recipe, ranks)
        for warning in plan_warnings(training.stages, ranks.device) if ranks.is_main else ():
            print(warning, flush=True)
        return training.run()


class TrainingRun:
    """A recipe's stages, checked and planned; `run` trains what is left of them."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        start_s = time.perf_counter()
        self._recipe = recipe
        self._ranks = ranks
        directory = Path(recipe.train.output)
        data = read_training_data(recipe.data)
        tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.context_length)
        facts = {"data": data.sha256, "tokenizer": tokenizer.sha256, "options": recipe.to_yaml()}
        self._balance_sha256 = data.balance_sha256(recipe)
        check_same_start(facts | {"balance": self._balance_sha256 or "none"} | versions(), ranks)
        self._context = RunContext(
            directory=directory,
            ranks=ranks,
            data=data,
            tokenizer=tokenizer,
            bad_samples=BadSamples(directory, ranks, recipe.data.max_bad_ratio, " ".join(data.names)),
            fault_log=FaultLog(directory, ranks),
            checkpoints=CheckpointWriter(directory, recipe, tokenizer, ranks),
            evaluation=LiveEvaluation(recipe.evaluation, tokenizer, ranks),
            profiler=ProfileWindow(recipe.log.profile_steps, directory, ranks),
            stop=StopRequest(),
            watchdog=Watchdog(directory, ranks, recipe.faults.hang_timeout_s),
            start_s=start_s,
        )
        encoder = tokenizer.encoder
        self._checkpoint = choose_checkpoint(directory, recipe.train.resume, ranks)
        self._progress = Progress(0, 0) if self._checkpoint is None else read_contents(self._checkpoint).progress
        self._stages = plan_stages(
            recipe, data.epochs, ranks.world_size, encoder.vocab_size, encoder.end_token_id, self._progress
        )
        self._configs = [
            deepspeed_config(stage.recipe, stage.batches, recipe.train.deepspeed_config) for stage in self._stages
        ]
        self._word_counts_sha256 = self._check_stages()
        taught = {stage.curriculum.concepts.sha256 for stage in self._stages if stage.curriculum} - {""}
        self._concepts_sha256 = next(iter(taught), None)  # all stages have the same file
        resumed = None if self._checkpoint is None else self._checkpoint.parent.parent  # a run, this or another
        if resumed is not None:
            of_files = (self._word_counts_sha256, self._balance_sha256, self._concepts_sha256)
            check_unchanged(resumed, recipe, data.sha256, tokenizer.sha256, *of_files)
        self._start_sha256 = check_start_weights(resumed, recipe.model.start_from, ranks)
        self._print_plan()

    def _check_stages(self) -> str | None:
        """What would stop a later stage, before the first begins; the hash of the word counts that stages use."""
        sha256 = None
        for stage, config in zip(self._stages, self._configs, strict=True):
            order = self._context.data.order(stage.recipe.data, stage.seed)
            self._context.data.check_batch(order, stage.own_positions, stage.batches.global_batch_size)
            shards = self._context.data.shards_of(stage.recipe.data)
            check_room(shards, stage.recipe.data, len(self._context.data.sets), stage.samples_ahead)
            check_stage(stage, config, Machine.of(self._ranks.device))
            sha256 = TextMasker(self._context.tokenizer, stage.recipe.text_masking).word_counts_sha256 or sha256
        return sha256

    @property
    def stages(self) -> tuple[Stage, ...]:
        """As they are planned from where the run stands."""
        return self._stages

    @property
    def _total_steps(self) -> int:
        return self._stages[-1].end_step

    def run(self) -> int:
        """Train to the end or until told to stop; returns the process's exit code."""
        directory, ranks = self._context.directory, self._ranks
        progress = self._progress
        if self._checkpoint is not None:
            self._context.print(f"resuming from {self._checkpoint} at step {progress.step:,}")
            ranks.from_main(lambda: set_aside_later(directory, progress.step))
        if progress.step >= self._total_steps:
            self._context.print(f"{directory} is finished: {progress.step:,} of {self._total_steps:,} steps")
            return 0
        self._context.stop.listen()
        if ranks.is_main:
            directory.mkdir(parents=True, exist_ok=True)
            write_record(directory, self._recipe, self._record(progress))
        ranks.barrier()
        self._context.watchdog.start()
        progress = self._train(progress)
        self._context.watchdog.close()
        if progress.step < self._total_steps:
            self._context.print(f"stopped at step {progress.step:,} as asked; the same command continues from there")
            return EXIT_INTERRUPTED
        if ranks.is_main:
            write_json(directory / RECORD, self._record(progress) | {"finished": timestamp()})
            print(self._describe_coverage(), flush=True)
        self._context.print(f"finished: {directory}")
        return 0

    def _train(self, progress: Progress) -> Progress:
        logger = None
        if self._ranks.is_main:
            logger = RunLogger(self._context.directory, progress.step, self._stages, self._recipe.log)
        for stage, config in zip(self._stages, self._configs, strict=True):
            if progress.step >= stage.end_step:
                continue
            if self._ranks.any(bool(self._context.stop)):
                break
            trainer = self._begin(stage, config, progress)
            progress = trainer.train(logger)
            trainer.close()
            self._checkpoint = checkpoint_directory(self._context.directory, progress.step)
        if logger:
            logger.close()
        return progress

    def _begin(self, stage: Stage, config: dict[str, Any], progress: Progress) -> StageTrainer:
        """A trainer where the run stands: in the middle of the stage, or at its start with the weights so far."""
        self._context.watchdog.expect_long()  # until its first step is done
        is_under_way = progress.step > stage.first_step
        before = None if is_under_way else self._checkpoint
        if before is not None:
            self._context.print(f"stage {stage.name} begins with the weights of {before}")
        clip = make_model(stage, before, self._ranks.device)
        if self._checkpoint is None and self._recipe.model.start_from:
            load_start_weights(clip, self._recipe.model.start_from, self._context.tokenizer, self._ranks)
        trainer = StageTrainer(stage, clip, config, self._context)
        if is_under_way and self._checkpoint is not None:
            trainer.resume(self._checkpoint, progress)
        return trainer

    def _record(self, progress: Progress) -> dict[str, Any]:
        context = self._context
        started = read_record(context.directory).get("started", timestamp())
        return {
            "format_version": 1,
            "started": started,
            "model": self._recipe.model.name,
            "parameters": count_parameters(self._stages[-1].model),
            "world_size": self._ranks.world_size,
            "device": str(self._ranks.device),
            "total_steps": self._total_steps,
            "samples_seen": progress.samples_seen,
            "dataset_samples": context.data.num_samples,
            "manifest_sha256": context.data.sha256,
            "data_sets": context.data.record(),
            "balance_sha256": self._balance_sha256,
            "tokenizer_sha256": context.tokenizer.sha256,
            "word_counts_sha256": self._word_counts_sha256,
            "concepts_sha256": self._concepts_sha256,
            RECORD_KEY: self._start_sha256,
            "stages": [self._record_stage(*planned) for planned in zip(self._stages, self._configs, strict=True)],
            "versions": versions(),
        }

    def _record_stage(self, stage: Stage, config: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": stage.name,
            "first_step": stage.first_step,
            "end_step": stage.end_step,
            "samples": stage.num_samples,
            "image_size": stage.model.vision.image_size,
            "deepspeed_config": config,
        }

    def _describe_coverage(self) -> str:
        last, data = self._stages[-1], self._context.data
        orders = [data.order(stage.recipe.data, stage.seed) for stage in self._stages]
        return describe_reads("the run", data, list(zip(orders, last.positions(last.end_step), strict=True)))

    def _describe_data(self) -> str:
        """The mixture and its balances, once where all stages have the same."""
        lines = [self._context.data.describe_mixture(stage.recipe.data, stage.seed) for stage in self._stages]
        return "".join(dict.fromkeys(lines))

    def _warnings(self) -> list[str]:
        of_stages = [warning for stage in self._stages for warning in warnings_about(stage)]
        return of_stages + warnings_about_precision(self._configs[0], Machine.of(self._ranks.device))

    def _print_plan(self) -> None:
        config = self._configs[0]
        self._context.print(
            f"{self._recipe.model.name}, ZeRO stage {zero_stage(config)}, {precision_of(config)} "
            f"on {self._ranks.world_size} x {self._ranks.device.type}\n"
            + self._describe_data()
            + describe_stages(self._stages, len(self._context.data.shards))
            + "".join(f"\n{warning}" for warning in self._warnings())
            + f"\nDeepSpeed: {json.dumps(config)}"
        )
