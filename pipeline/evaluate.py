"""Evaluate checkpoints: zero-shot classification, retrieval, composition -> results.jsonl and a table.

Whole, or as slices of an array of jobs, which `pipeline/report.py collect` puts together.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch

from formats.errors import UserError
from formats.files import location_argument, path_argument
from formats.programs import add_launcher_argument, run, whole
from formats.word_counts import read_word_frequencies
from pipeline.evaluation.features import FeatureEncoder
from pipeline.evaluation.jobs import (
    TASKS,
    Failure,
    Job,
    Slice,
    encode_slice,
    make_job,
    raise_first,
    score_job,
    tasks_of,
)
from pipeline.evaluation.masked_images import check_maskable
from pipeline.evaluation.results import RESULTS_FILE, format_table, read_results, write_results
from pipeline.evaluation.sets.layouts import EvaluationSet, open_evaluation_sets
from pipeline.evaluation.sweep import read_sweep
from pipeline.inference import load_any_model
from pipeline.ranks import explain_lost_peers, init_ranks, part_ranks

# Of what a rank has to encode, much may be there already: it then waits for the others.
_PATIENCE = timedelta(days=7)


def main(argv: Sequence[str]) -> int:
    """Evaluate as the arguments say; returns the exit code. Raises UserError for everything that does not fit."""
    arguments = _parse(argv)
    options = None if arguments.tasks == "auto" else [task.strip() for task in arguments.tasks.split(",")]
    datasets = _open(arguments.data, options)
    if arguments.word_counts:
        read_word_frequencies(arguments.word_counts)  # what is wrong with it shows before anything is encoded
    if (arguments.output / RESULTS_FILE).exists():
        read_results(arguments.output / RESULTS_FILE)  # likewise
    with explain_lost_peers("what is encoded is kept"):
        ranks = init_ranks(_PATIENCE)

        def load(checkpoint: str) -> FeatureEncoder:
            model = load_any_model(checkpoint, ranks.device, arguments.tokenizer, arguments.model)
            masking = model.masking if arguments.mask_images else None
            if masking is not None:
                check_maskable(masking)
            identity = replace(model.identity, precision="" if arguments.precision == "fp32" else arguments.precision)
            return FeatureEncoder(
                identity, model.clip, model.tokenizer, model.preprocessing, ranks, arguments.workers, masking
            )

        def jobs_of(encoder: FeatureEncoder) -> list[Job]:
            size, words = arguments.batch_size, arguments.word_counts
            return [
                make_job(encoder.model, data, dataset, options, size, encoder.masking, words)
                for data, dataset in datasets.items()
            ]

        encoded: list[Job] = []
        failures: list[Failure] = []
        for checkpoint in arguments.checkpoint:
            try:
                encoder = ranks.together(partial(load, checkpoint))
            except UserError as error:  # others can still be evaluated
                failures.append(error)
                continue
            for job in jobs_of(encoder):
                try:
                    _encode(job, encoder, arguments.slice, arguments.output)
                    encoded.append(job)
                except (UserError, OSError) as error:
                    failures.append(error)
        # scoring may take long, of a probe above all: nobody waits for it
        part_ranks(ranks)
    if ranks.is_main:
        failures += _finish(encoded, arguments.slice, arguments.output, ranks.device)
    raise_first(failures)
    return 0


def _encode(job: Job, encoder: FeatureEncoder, part: Slice | None, output: Path) -> None:
    if encoder.ranks.is_main:
        tasks = ", ".join(task.option for task in job.tasks)
        print(f"{job.model.checkpoint}: {job.dataset.name}, {tasks}, {len(job.dataset.samples):,} samples", flush=True)
    encode_slice(job, encoder, part or Slice(), output)


def _finish(jobs: Sequence[Job], part: Slice | None, output: Path, device: torch.device) -> Iterator[Failure]:
    """Score what is encoded, or say what to do when all slices are; gives the errors of what cannot be scored."""
    for job in jobs:
        name = job.dataset.name
        if part is not None:
            hint = f"python pipeline/report.py collect {output}"
            print(f"slice {part} of {name} is encoded; when all are: {hint}", flush=True)
            continue
        try:
            results = score_job(job, output, device, is_checked=True)
            # one by one: what is measured stays, whatever happens to the next data set
            write_results(output, results)
        except (UserError, OSError) as error:
            yield error
        else:
            print(f"{format_table(results)}\n\nresults in {output / RESULTS_FILE}", flush=True)


def _open(directories: Sequence[Path], options: Sequence[str] | None) -> dict[Path, EvaluationSet]:
    """The data sets of the wanted tasks. Raises UserError for an unknown task and for one without a data set."""
    opened = open_evaluation_sets(directories)
    fitting = {directory: tasks_of(dataset, options) for directory, dataset in opened.items()}
    for directory, tasks in fitting.items():
        for task in tasks:
            task.collections(opened[directory])  # what it cannot use shows before anything is encoded
    for option in options or ():
        if not any(TASKS[option] in tasks for tasks in fitting.values()):
            raise UserError(f"no dataset for task {option}: none of {', '.join(map(str, directories))} fits")
    return {directory: opened[directory] for directory, tasks in fitting.items() if tasks}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, over what its sweep file says."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.sweep:
        parser.set_defaults(**read_sweep(arguments.sweep))
        arguments = parser.parse_args(argv)
    for option in ("checkpoint", "data", "output"):
        if not getattr(arguments, option):
            parser.error(f"--{option} is missing, here and in --sweep")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Evaluate checkpoints: zero-shot classification, retrieval, composition.",
        epilog="example: deepspeed pipeline/evaluate.py --checkpoint runs/demo --data eval/zeroshot eval/retrieval "
        "--output runs/demo/evaluation",
    )
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        type=location_argument,
        metavar="MODEL",
        help="runs, checkpoints, models of open_clip or transformers",
    )
    parser.add_argument(
        "--data", nargs="+", type=path_argument, metavar="DIR", help="evaluation sets (docs/evaluation.md)"
    )
    parser.add_argument("--output", type=path_argument, metavar="DIR", help="where results.jsonl grows")
    parser.add_argument(
        "--sweep", type=path_argument, metavar="FILE", help="YAML file that gives these options instead"
    )
    parser.add_argument(
        "--tasks",
        default="auto",
        help=f"auto (what the directories hold; the default) or a list of {','.join(TASKS)}",
    )
    parser.add_argument(
        "--slice",
        type=Slice.parse,
        metavar="I/N",
        help="encode only part I of N (from 0) of every set, e.g. in a job array; then `report.py collect`",
    )
    parser.add_argument(
        "--batch-size", type=whole, default=64, metavar="N", help="images or texts at once (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the features; bf16 is faster, and moves figures a little (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=whole,
        default=min(16, len(os.sched_getaffinity(0))),
        metavar="N",
        help="image decoding threads per rank (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        type=location_argument,
        metavar="FILE",
        help="of open_clip's models (default: clip-bpe); a checkpoint brings its own, and is checked to be of this one",
    )
    parser.add_argument("--model", metavar="NAME", help="what an open_clip file without a configuration is: ViT-B-16 …")
    parser.add_argument(
        "--mask-images",
        action="store_true",
        help="hide patches as training did, each image by itself; results under a name of their own",
    )
    parser.add_argument(
        "--word-counts",
        type=location_argument,
        metavar="FILE",
        help="`data-prep words` of the training captions: accuracy also by the frequency of class names",
    )
    add_launcher_argument(parser)
    return parser


if __name__ == "__main__":
    run(main)
