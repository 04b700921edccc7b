"""A training run from recipe to last checkpoint."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from model.clip import CLIP
from pipeline.checkpoint import Progress, newest_checkpoint, resume, save_checkpoint
from pipeline.data_loader import Batch, MicroBatches, TrainingSet, make_loader
from pipeline.engine import deepspeed_config, make_engine, zero_stage
from pipeline.errors import UserError
from pipeline.files import write_json
from pipeline.manifest import read_manifest
from pipeline.mask_drawer import MaskDrawer
from pipeline.metrics_window import MetricsWindow
from pipeline.optimizer import learning_rate
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe
from pipeline.run_logger import RunLogger, timestamp
from pipeline.run_record import RECORD, check_unchanged, read_record, versions, write_record
from pipeline.sample_order import BatchPlan, SampleOrder
from pipeline.start_weights import RECORD_KEY, check_start_weights, load_start_weights
from pipeline.text_masking import TextMasker
from pipeline.tokenizer import load_tokenizer
from pipeline.train_step import OPTIONAL_NAMES, REPORT_NAMES, train_step

# Asks whoever started the run to start it again: EX_TEMPFAIL of sysexits.h, on which slurm/train.sbatch requeues.
EXIT_INTERRUPTED = 75

# The share of bad samples is judged over at least this many, so that one among the first few does not stop a run.
_MIN_SAMPLES_JUDGED = 1000
_PROBLEMS_SHOWN = 5


def plan_batches(recipe: Recipe, num_samples: int, world_size: int) -> BatchPlan:
    """Check the batch arithmetic; raises UserError that shows it and what would fit."""
    micro, total = recipe.train.micro_batch_size, recipe.train.global_batch_size
    if total % (micro * world_size):
        raise UserError(
            f"train.global_batch_size {total} is not a multiple of micro_batch_size {micro} x {world_size} ranks "
            f"= {micro * world_size}: take {max(1, round(total / (micro * world_size))) * micro * world_size}, "
            "or another micro_batch_size"
        )
    if num_samples < total:
        raise UserError(
            f"{num_samples:,} samples do not fill one global batch of {total:,} ({world_size} ranks x "
            f"{total // world_size:,} each): use more data, or a train.global_batch_size of at most {num_samples:,}"
        )
    return BatchPlan(num_samples, total, micro, world_size)


class Trainer:
    """Everything one run needs, made once; `run` is the loop."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        if not recipe.train.output:
            raise UserError("no run directory: give train.output=DIRECTORY")
        self._start_s = time.perf_counter()
        self.recipe = recipe
        self.ranks = ranks
        self.run_directory = Path(recipe.train.output)
        self.manifest = read_manifest(recipe.data.train)
        self.tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.context_length)
        self.text_masker = TextMasker(self.tokenizer, recipe.text_masking)
        self.plan = plan_batches(recipe, self.manifest.num_samples, ranks.world_size)
        epochs_steps = max(1, round(recipe.train.epochs * self.plan.steps_per_epoch))
        self.total_steps = recipe.train.max_steps or epochs_steps
        self.masking = recipe.masking.to_config()
        self.config = deepspeed_config(recipe, self.plan, recipe.train.deepspeed_config)
        self._checkpoint = newest_checkpoint(self.run_directory)
        if self._checkpoint is not None:
            check_unchanged(
                self.run_directory,
                recipe,
                self.manifest.sha256,
                self.tokenizer.sha256,
                self.text_masker.word_counts_sha256,
            )
        self._print_plan()

        torch.manual_seed(recipe.train.seed)  # the same initial weights on every rank
        encoder = self.tokenizer.encoder
        clip = CLIP(recipe.clip_config(encoder.vocab_size, encoder.end_token_id)).to(ranks.device)
        self.start_sha256 = self._start(clip)
        self.num_parameters = sum(parameter.numel() for parameter in clip.parameters())
        self.engine = make_engine(clip, recipe, self.config, ranks)
        self.masks = MaskDrawer(
            self.masking, self.engine.module.visual, clip.config.vision.patch_size, recipe.train.seed, ranks
        )
        self.progress = Progress(step=0, samples_seen=0)
        self._stop_requested = False

    def run(self) -> int:
        """Train to the end or until told to stop; returns the process's exit code."""
        if self._checkpoint is not None:
            self.progress = resume(self.engine, self._checkpoint, self.ranks)
            self._print(f"resuming from {self._checkpoint} at step {self.progress.step:,}")
        if self.progress.step >= self.total_steps:
            self._print(f"{self.run_directory} is finished: {self.progress.step:,} of {self.total_steps:,} steps")
            return 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._request_stop)
        if self.ranks.is_main:
            self.run_directory.mkdir(parents=True, exist_ok=True)
            write_record(self.run_directory, self.recipe, self._record())
        self.ranks.barrier()
        self._train()
        if self.progress.step < self.total_steps:
            self._print(f"stopped at step {self.progress.step:,} as asked; the same command continues from there")
            return EXIT_INTERRUPTED
        if self.ranks.is_main:
            write_json(self.run_directory / RECORD, self._record() | {"finished": timestamp()})
        self._print(f"finished: {self.run_directory}")
        return 0

    def _train(self) -> None:
        batches = self._batches()
        logger = RunLogger(self.run_directory, self.progress.step, self.total_steps) if self.ranks.is_main else None
        window = MetricsWindow(self.ranks)
        bad_samples, samples_read = 0, 0
        while self.progress.step < self.total_steps:
            step = self.progress.step
            lr = learning_rate(step, self.total_steps, self.recipe.optimizer)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = lr

            micro_batches = window.timed_fetch(batches, self.plan.accumulation_steps)
            progress = step / max(1, self.total_steps - 1)
            report = train_step(self.engine, micro_batches, self.masks, self.ranks, step, progress)
            window.add(report)
            self._note_problems([problem for batch in micro_batches for problem in batch.problems])
            bad_samples += sum(len(batch.problems) for batch in micro_batches)
            samples_read += self.plan.global_batch_size
            self.progress = Progress(step + 1, self.progress.samples_seen + self.plan.global_batch_size)

            is_last = self.progress.step == self.total_steps
            if is_last or self.progress.step % self.recipe.train.log_every_steps == 0:
                metrics = self._metrics(window, lr, bad_samples)
                if logger:
                    logger.log(metrics)
                self._check(metrics, samples_read)
                if self.ranks.any(self._stop_requested):
                    self._save()
                    break
                window = MetricsWindow(self.ranks)
            if is_last or self.progress.step % self.recipe.train.save_every_steps == 0:
                self._save()
        if logger:
            logger.close()

    def _start(self, clip: CLIP) -> str:
        """Initial weights from elsewhere, if asked for and this is the start; the hash of their file, or ""."""
        source = self.recipe.model.start_from
        if self._checkpoint is not None:
            return check_start_weights(self.run_directory, source, self.ranks)
        return load_start_weights(clip, source, self.tokenizer, self.ranks) if source else ""

    def _batches(self) -> Iterator[Batch]:
        sizes = tuple(shard.samples for shard in self.manifest.shards)
        order = SampleOrder(sizes, self.recipe.data.window_shards, self.recipe.train.seed)
        image_size = self.engine.module.config.vision.image_size
        dataset = TrainingSet(self.manifest, order, self.text_masker, image_size, self.recipe.data.crop_min_area)
        places = MicroBatches(self.plan, self.ranks.rank, self.progress.step, self.total_steps)
        loader = make_loader(dataset, places, self.recipe.data.workers, self.ranks.device.type == "cuda")
        try:
            yield from loader
        except UserError as error:
            # a worker's error arrives with its traceback in the message; the last line is ours
            raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None

    def _metrics(self, window: MetricsWindow, lr: float, bad_samples: int) -> dict[str, Any]:
        """Means over the steps since the last log, over all ranks. Waits for the device."""
        means, seconds, data_wait_share = window.close()
        values = self.ranks.mean(torch.cat((means, means.new_tensor([bad_samples])))).tolist()
        report = dict(zip((*REPORT_NAMES, "bad_samples"), values, strict=True))
        report |= {name: None for name in OPTIONAL_NAMES if math.isnan(report[name])}
        micro_batches_per_s = window.steps * self.plan.accumulation_steps * self.ranks.world_size / seconds
        grad_norm = self.engine.get_global_grad_norm()
        return {
            "step": self.progress.step,
            "epoch": self.progress.step / self.plan.steps_per_epoch,
            "samples_seen": self.progress.samples_seen,
            **report,
            "bad_samples": round(report["bad_samples"] * self.ranks.world_size),
            "lr": lr,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "samples_per_s": window.steps * self.plan.global_batch_size / seconds,
            "tokens_per_s": (report["image_tokens"] + report["text_tokens"]) * micro_batches_per_s,
            "data_wait_share": data_wait_share,
            "seconds_per_step": seconds / window.steps,
            "wall_time_s": time.perf_counter() - self._start_s,
            "time": timestamp(),
        }

    def _check(self, metrics: dict[str, Any], samples_read: int) -> None:
        """Stop on a loss that is no number or on too many bad samples; every rank sees the same figures."""
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                f"the loss is {metrics['loss']} at step {metrics['step']}: lower optimizer.lr or lengthen "
                "optimizer.warmup_steps; the last checkpoint is intact"
            )
        allowed = self.recipe.data.max_bad_ratio * max(samples_read, _MIN_SAMPLES_JUDGED)
        if metrics["bad_samples"] > allowed:
            raise UserError(
                f"{metrics['bad_samples']} of {samples_read:,} samples could not be used, more than "
                f"data.max_bad_ratio={self.recipe.data.max_bad_ratio} allows; {self._problems_file()} names them; "
                f"`data-prep verify {self.manifest.directory}` marks them to be left out"
            )

    def _note_problems(self, problems: list[str]) -> None:
        if not problems:
            return
        path = self._problems_file()
        known = path.read_text().count("\n") if path.exists() else 0
        with path.open("a") as file:
            file.writelines(" ".join(problem.split()) + "\n" for problem in problems)
        for problem in problems[: max(0, _PROBLEMS_SHOWN - known)]:
            print(f"warning: skipped {problem} (all are listed in {path})", flush=True)

    def _problems_file(self) -> Path:
        return self.run_directory / f"bad_samples_rank{self.ranks.rank}.txt"

    def _save(self) -> None:
        start_s = time.perf_counter()
        directory = save_checkpoint(
            self.engine,
            self.run_directory,
            self.progress,
            self.tokenizer,
            self.masking,
            self.recipe.train.keep_checkpoints,
            self.ranks,
        )
        self._print(f"saved {directory} in {time.perf_counter() - start_s:.1f} s")

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested = True

    def _record(self) -> dict[str, Any]:
        started = read_record(self.run_directory).get("started", timestamp())
        return {
            "format_version": 1,
            "started": started,
            "model": self.recipe.model.name,
            "parameters": self.num_parameters,
            "world_size": self.ranks.world_size,
            "device": str(self.ranks.device),
            "total_steps": self.total_steps,
            "samples_seen": self.progress.samples_seen,
            "dataset_samples": self.manifest.num_samples,
            "manifest_sha256": self.manifest.sha256,
            "tokenizer_sha256": self.tokenizer.sha256,
            RECORD_KEY: self.start_sha256,
            "word_counts_sha256": self.text_masker.word_counts_sha256,
            "deepspeed_config": self.config,
            "versions": versions(),
        }

    def _print_plan(self) -> None:
        plan, recipe = self.plan, self.recipe
        precision = "bf16" if self.config.get("bf16", {}).get("enabled") else "fp32"
        self._print(
            f"{recipe.model.name}, masking {self.masking.strategy} "
            f"{self.masking.target_mask_ratio if self.masking.strategy != 'none' else 0:.0%}, "
            f"ZeRO stage {zero_stage(self.config)}, {precision} on {plan.world_size} x {self.ranks.device.type}\n"
            f"batch: {plan.global_batch_size:,} = {plan.micro_batch_size:,} micro x {plan.accumulation_steps} "
            f"accumulation x {plan.world_size} ranks; each pair meets "
            f"{plan.micro_batch_size * plan.world_size - 1:,} negatives\n"
            f"steps: {plan.num_samples:,} samples in {len(self.manifest.shards):,} shards = "
            f"{plan.steps_per_epoch:,} steps per epoch; {self.total_steps:,} steps = "
            f"{self.total_steps / plan.steps_per_epoch:.2f} epochs = "
            f"{self.total_steps * plan.global_batch_size:,} samples"
        )

    def _print(self, text: str) -> None:
        if self.ranks.is_main:
            print(text, flush=True)
