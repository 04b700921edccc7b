"""Saving: when, and by all ranks at once, published by one; a failure costs the new checkpoint and never an old one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from formats.errors import UserError
from formats.files import flush_to_disk, sha256_of, write_atomically, write_json
from model.clip import CLIP
from model.masking import MaskingConfig
from pipeline.data.captions import Tokenizer
from pipeline.ranks import Ranks
from pipeline.recipe import Recipe, TrainSection
from pipeline.training.checkpoints.checkpoint import (
    COMPLETE,
    MODEL_CARD,
    TOKENIZER,
    WEIGHTS,
    Contents,
    FileRecord,
    TrainingState,
    carried_file,
    checkpoint_directory,
    complete_checkpoints,
    list_checkpoints,
    rank_file,
    step_of,
)
from pipeline.training.checkpoints.rank_state import optimizer_state, rng_state
from pipeline.training.progress import Progress
from pipeline.versions import versions

# A run whose disk is full goes on, so that somebody can make room; after so many failed saves in a row it stops.
_MAX_FAILURES = 3

FileRecords = dict[str, FileRecord]


class SaveSchedule:
    """When to save: every so many steps, and when this long nothing was saved.

    The same answer on every rank: steps are counted by all, the clock is the main rank's.
    """

    def __init__(self, train: TrainSection, ranks: Ranks) -> None:
        self._train = train
        self._ranks = ranks
        self._saved_s = time.monotonic()

    def is_due(self, step: int, is_logged: bool) -> bool:
        """Whether to save after `step` steps. The clock is asked at logged steps, where all ranks meet anyway."""
        if step % self._train.save_every_steps == 0:
            return True
        if self._train.save_every_minutes is None or not is_logged:
            return False
        minutes = (time.monotonic() - self._saved_s) / 60
        return self._ranks.any(self._ranks.is_main and minutes >= self._train.save_every_minutes)

    def saved(self) -> None:
        """Count the minutes from now on."""
        self._saved_s = time.monotonic()


class CheckpointWriter:
    """Writes the checkpoints of a run, all stages together.

    total_save_s: time spent saving since this start of the run
    """

    def __init__(self, run_directory: Path, recipe: Recipe, tokenizer: Tokenizer, ranks: Ranks) -> None:
        self.total_save_s = 0.0
        self._run_directory = run_directory
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._failures = 0
        self._newest: Path | None = None

    def save(self, state: TrainingState, progress: Progress, must_succeed: bool) -> None:
        """Save on all ranks (collective), publish, then delete what `train.keep_checkpoints` does not keep.

        Nothing to do if this step is saved already. A failure is a warning, and the next save tries again; it is a
        UserError if this one `must_succeed`, or if it is the third in a row. Checkpoints that were there before stay.
        """
        start_s = time.perf_counter()
        directory = checkpoint_directory(self._run_directory, progress.step)
        if directory == self._newest:
            return
        problem = self._save(directory, state, progress)
        seconds = time.perf_counter() - start_s
        self.total_save_s += seconds
        if problem is None:
            self._failures, self._newest = 0, directory
            self._print(f"saved {directory} in {seconds:.1f} s")
            return
        self._failures += 1
        message = f"{directory} could not be saved: {problem}; earlier checkpoints are intact"
        if must_succeed or self._failures >= _MAX_FAILURES:
            raise UserError(message)
        self._print(f"warning: {message}, and the next save tries again")

    def _save(self, directory: Path, state: TrainingState, progress: Progress) -> str | None:
        """What went wrong on any rank; None if the checkpoint is published."""
        ranks = self._ranks
        problem = self._try_on_main(lambda: _make_empty(directory))
        if problem is None:
            records, problem = self._write(directory, state, progress)
        if problem is None:
            contents = Contents(
                progress=progress,
                world_size=ranks.world_size,
                zero_stage=state.engine.stage,
                precision=state.engine.precision,
                versions=versions(),
                recipe=self._recipe.model_dump(mode="json"),
                files=records,
            )
            problem = self._try_on_main(lambda: publish(directory, contents))
        if ranks.is_main and problem is None:
            self._delete_outdated(directory)
        elif ranks.is_main:
            shutil.rmtree(directory, ignore_errors=True)
        return problem

    def _write(self, directory: Path, state: TrainingState, progress: Progress) -> tuple[FileRecords, str | None]:
        """Each rank its own files, all at once; returns the records of all, and what went wrong on any."""
        ranks = self._ranks
        # what is collective comes first, so that no rank waits for one that failed
        weights = state.engine.weights(ranks)
        own = {rank_file(ranks.rank): optimizer_state(state.engine.deepspeed, ranks) | rng_state(ranks.device)}
        carried = {carried_file(thing): thing.state() for thing in state.carried}
        records: FileRecords = {}
        problem = None
        try:
            if ranks.is_main:
                clip = state.engine.module
                records = write_model_files(directory, clip, weights, progress, self._tokenizer, state.masking)
                own |= {name: tensors for name, tensors in carried.items() if tensors}
            records |= {name: _write_tensors(tensors, directory / name) for name, tensors in own.items()}
        except (OSError, SafetensorError) as error:
            problem = str(error) if ranks.world_size == 1 else f"{error} (rank {ranks.rank})"
        written = ranks.gather_objects((records, problem))
        all_records = {name: record for records, _ in written for name, record in records.items()}
        return all_records, next((problem for _, problem in written if problem), None)

    def _try_on_main(self, act: Callable[[], None]) -> str | None:
        """Why the main rank could not do it, on all ranks."""
        problem = None
        if self._ranks.is_main:
            try:
                act()
            except OSError as error:
                problem = str(error)
        return self._ranks.gather_objects(problem)[0]

    def _delete_outdated(self, newest: Path) -> None:
        train = self._recipe.train
        complete = {step_of(checkpoint): checkpoint for checkpoint in complete_checkpoints(self._run_directory)}
        for step in outdated(complete, train.keep_checkpoints, train.keep_every_steps):
            (complete[step] / COMPLETE).unlink(missing_ok=True)  # first: half of it is none
            shutil.rmtree(complete[step], ignore_errors=True)
        for checkpoint in list_checkpoints(self._run_directory):
            if checkpoint != newest and not (checkpoint / COMPLETE).exists():  # what a killed run left
                shutil.rmtree(checkpoint, ignore_errors=True)

    def _print(self, text: str) -> None:
        if self._ranks.is_main:
            print(text, flush=True)


def outdated(steps: Iterable[int], keep: int, keep_every_steps: int | None) -> list[int]:
    """Which checkpoints to delete: all but the newest `keep` and the first at or after each multiple, ascending."""
    steps = sorted(steps)
    for_good: dict[int, int] = {}
    for step in steps if keep_every_steps else ():
        for_good.setdefault(step // (keep_every_steps or 1), step)
    for_good.pop(0, None)
    return [step for step in steps[:-keep] if step not in for_good.values()]


def write_model_files(
    directory: Path,
    clip: CLIP,
    weights: Mapping[str, Tensor],
    progress: Progress,
    tokenizer: Tokenizer,
    masking: MaskingConfig,
) -> FileRecords:
    """What evaluation reads."""
    weights_record = _write_tensors(weights, directory / WEIGHTS)
    (directory / TOKENIZER).write_bytes(tokenizer.source)
    card = {
        "format_version": 1,
        "model": clip.config.to_dict(),
        "masking": asdict(masking),
        "tokenizer_sha256": tokenizer.sha256,
        "weights_sha256": weights_record.sha256,
        **asdict(progress),
    }
    (directory / MODEL_CARD).write_text(json.dumps(card, indent=2) + "\n")
    return {WEIGHTS: weights_record} | {name: _record(directory / name) for name in (MODEL_CARD, TOKENIZER)}


def publish(directory: Path, contents: Contents) -> None:
    """Make a directory whose files are all on the disk a checkpoint, and say that it is the latest."""
    write_json(directory / COMPLETE, contents.to_json())
    flush_to_disk(directory)
    flush_to_disk(directory.parent)
    write_atomically(directory.parent / "latest", directory.name + "\n")


def _make_empty(directory: Path) -> None:
    if directory.exists():
        shutil.rmtree(directory)  # what a killed run left of the same step
    directory.mkdir(parents=True)


def _write_tensors(tensors: Mapping[str, Tensor], path: Path) -> FileRecord:
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path)
    path.chmod(mode)  # safetensors makes files for their owner alone
    return _record(path)


def _record(path: Path) -> FileRecord:
    flush_to_disk(path)
    return FileRecord(path.stat().st_size, sha256_of(path))
