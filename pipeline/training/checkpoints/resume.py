"""Resuming: which checkpoint all ranks go on from, verified by all of them, and putting a run where it stood."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from formats.errors import UserError
from pipeline.ranks import Ranks, is_of_lost_peer
from pipeline.training.checkpoints.checkpoint import (
    COMPLETE,
    WEIGHTS,
    TrainingState,
    carried_file,
    checkpoints_directory,
    find_damage,
    list_checkpoints,
    newest_checkpoint,
    rank_file,
    read_contents,
    read_tensors,
    step_of,
    what_is_missing,
)
from pipeline.training.checkpoints.rank_state import load_optimizer_state, load_rng_state
from pipeline.training.observing.run_logger import METRICS


def choose_checkpoint(run_directory: Path, resume: str, ranks: Ranks) -> Path | None:
    """The checkpoint that all ranks go on from, None to start afresh (collective).

    resume: auto: the run's newest that verifies; never: the run must be new; or the path of a run or checkpoint, for
    good: once the run has a checkpoint made with the same path, that one or a later is taken.

    Raises UserError rather than start afresh where there is state that cannot be used.
    """
    if resume == "never":
        ranks.from_main(lambda: _check_new(run_directory))
        return None
    given = ranks.from_main(lambda: _given_checkpoint(run_directory, resume))
    return _first_usable([given] if given else ranks.from_main(lambda: _candidates(run_directory)), ranks)


def _first_usable(candidates: Sequence[Path], ranks: Ranks) -> Path | None:
    problems = []
    for checkpoint in candidates:
        problem = verify(checkpoint, ranks)
        if problem is None:
            return checkpoint
        problems.append(f"{checkpoint} cannot be used: {problem}")
        if ranks.is_main and checkpoint != candidates[-1]:
            print(f"warning: {problems[-1]}; trying the one before", flush=True)
    if problems:
        raise UserError(f"{problems[0]}; restore it, or choose another train.output to start afresh")
    return None


def verify(checkpoint: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint in the eyes of any rank, None if nothing (collective).

    Every rank looks for every file and hashes some of them.
    """
    start_s = time.perf_counter()
    try:
        contents = ranks.from_main(lambda: read_contents(checkpoint))
    except UserError as error:
        return str(error)
    by_size = sorted(contents.files, key=lambda name: contents.files[name].size_bytes, reverse=True)
    problems = ranks.gather_objects(find_damage(checkpoint, contents.files, by_size[ranks.rank :: ranks.world_size]))
    if any(problems):
        problem = next(problem for problem in problems if problem)
        if all(problems) or "sha256" in problem:
            return problem
        return f"{problem} on rank {problems.index(problem)}, not on all: a run needs a directory that all nodes share"
    size_bytes = sum(record.size_bytes for record in contents.files.values())
    if ranks.is_main:
        seconds = time.perf_counter() - start_s
        print(f"verified {checkpoint}: {size_bytes / 1e9:,.2f} GB in {seconds:.1f} s", flush=True)
    return None


def _check_new(run_directory: Path) -> None:
    if list_checkpoints(run_directory) or (run_directory / METRICS).exists():
        raise UserError(f"{run_directory} holds a run, and train.resume=never: choose another train.output")


def _candidates(run_directory: Path) -> list[Path]:
    """Checkpoints that were finished once, newest first; usable or not."""
    finished = {checkpoint for checkpoint in list_checkpoints(run_directory) if (checkpoint / COMPLETE).exists()}
    latest = checkpoints_directory(run_directory) / "latest"
    named = latest.read_text(errors="replace").strip() if latest.exists() else ""
    if re.fullmatch(r"step_\d+", named):  # else it is damaged, and the checkpoints speak for themselves
        finished.add(latest.with_name(named))
    if not finished and (run_directory / METRICS).exists():
        print(f"{run_directory} was stopped before its first checkpoint: it starts again", flush=True)
    return sorted(finished, reverse=True)


def _given_checkpoint(run_directory: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` names, None for auto or if the run has made one since."""
    if resume == "auto":
        return None
    own = [checkpoint for checkpoint in list_checkpoints(run_directory) if what_is_missing(checkpoint) is None]
    if own and read_contents(own[-1]).recipe["train"].get("resume") == resume:
        return None
    path = Path(resume)
    checkpoint = path if path.name.startswith("step_") else newest_checkpoint(path)
    if checkpoint is None or not checkpoint.is_dir():
        raise UserError(f"train.resume={resume}: no run or checkpoint there; known words are auto and never")
    if own and not _is_of(run_directory, checkpoint):
        raise UserError(
            f"{run_directory} has checkpoints, and train.resume={resume} is of another run: choose another train.output"
        )
    return checkpoint


def _is_of(run_directory: Path, checkpoint: Path) -> bool:
    return checkpoint.resolve().parent == checkpoints_directory(run_directory).resolve()


def set_aside_later(run_directory: Path, step: int) -> None:
    """Rename the checkpoints of a run that goes on from an earlier one: they are neither resumed nor deleted."""
    for later in list_checkpoints(run_directory):
        if step_of(later) > step and (later / COMPLETE).exists():
            aside = later.with_name(f"set_aside_{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}_{later.name}")
            later.rename(aside)
            print(f"{later} is later than step {step:,}: now {aside.name}", flush=True)


def restore(state: TrainingState, checkpoint: Path, ranks: Ranks, with_counters: bool = True) -> None:
    """Put weights, optimizer, generators and what is carried where the checkpoint has them (collective).

    Of any ZeRO stage, number of ranks and precision; also in the middle of training, where counters may count on.
    Raises UserError for files that cannot be read or belong to another model.
    """
    try:
        state.engine.load_weights(checkpoint / WEIGHTS)
        own = checkpoint / rank_file(ranks.rank)
        # this rank's own first: with as many ranks as before, the others have nothing for it
        files = sorted(checkpoint.glob("rank_*"), key=lambda file: (file != own, file))
        load_optimizer_state(state.engine.deepspeed, files)
        if own.exists():
            load_rng_state(own, ranks.device)
    except (OSError, SafetensorError, RuntimeError) as error:
        if is_of_lost_peer(error):
            raise
        raise UserError(f"{checkpoint} cannot be read: {' '.join(str(error).split())}") from error
    for thing in state.carried if with_counters else state.weights:
        if (checkpoint / carried_file(thing)).exists():  # else it has nothing to keep in this run
            thing.load_state(read_tensors(checkpoint / carried_file(thing)))
