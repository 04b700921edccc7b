"""Evaluate one checkpoint: zero-shot classification, retrieval, composition -> results.jsonl and a table."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import os
import time
from collections.abc import Sequence

from model.masking import MaskingConfig
from pipeline.entry import add_launcher_argument, run
from pipeline.errors import UserError
from pipeline.evaluation import composition, retrieval, zero_shot
from pipeline.evaluation.datasets import (
    ClassificationSet,
    EvaluationSet,
    RetrievalSet,
    open_evaluation_set,
)
from pipeline.evaluation.features import FeatureEncoder
from pipeline.evaluation.masked_images import check_maskable
from pipeline.evaluation.results import RESULTS_FILE, Result, Scores, format_table, write_results
from pipeline.inference import load_for_inference
from pipeline.ranks import init_ranks
from pipeline.training.run_record import versions

TASKS = {"zeroshot": zero_shot.TASK, "retrieval": retrieval.TASK, "composition": composition.TASK}


def main(argv: Sequence[str]) -> int:
    """Evaluate as the arguments say; returns the exit code. Raises UserError for everything that does not fit."""
    arguments = _parser().parse_args(argv)
    datasets = _select(arguments.tasks, [open_evaluation_set(Path(directory)) for directory in arguments.data])
    ranks = init_ranks()
    model = load_for_inference(arguments.checkpoint, ranks.device, arguments.tokenizer)
    masking = model.masking if arguments.mask_images else None
    if masking is not None:
        check_maskable(masking)
    encoder = FeatureEncoder(model, ranks, arguments.batch_size, arguments.workers, masking)
    results = []
    for dataset in datasets:
        start_s = time.monotonic()
        if ranks.is_main:
            print(f"{dataset.name}: {task_of(dataset)}, {len(dataset.samples):,} samples", flush=True)
        scores = evaluate(encoder, dataset)
        result = Result(
            model=model.name,
            checkpoint=model.checkpoint,
            dataset=dataset.name if masking is None else f"{dataset.name}, masked ({describe(masking)})",
            task=task_of(dataset),
            metrics=scores.metrics,
            chance=scores.chance,
            samples=scores.samples,
            template_sha256=scores.template_sha256,
            weights_sha256=model.weights_sha256,
            step=model.step,
            samples_seen=model.samples_seen,
            versions=versions(),
            wall_time_s=round(time.monotonic() - start_s, 3),
        )
        if ranks.is_main:
            # one by one: what is measured stays, whatever happens to the next dataset
            write_results(arguments.output, [result])
        results.append(result)
    if ranks.is_main:
        print(f"{model.name}, {model.checkpoint}, step {model.step}\n\n{format_table(results)}\n")
        print(f"results in {arguments.output / RESULTS_FILE}", flush=True)
    return 0


def evaluate(encoder: FeatureEncoder, dataset: EvaluationSet) -> Scores:
    """The scores that the kind of the dataset calls for."""
    if isinstance(dataset, ClassificationSet):
        return zero_shot.evaluate_zero_shot(encoder, dataset)
    if isinstance(dataset, RetrievalSet):
        return retrieval.evaluate_retrieval(encoder, dataset)
    return composition.evaluate_composition(encoder, dataset)


def task_of(dataset: EvaluationSet) -> str:
    """The task's name in results, as in CLIP_benchmark."""
    if isinstance(dataset, ClassificationSet):
        return zero_shot.TASK
    return retrieval.TASK if isinstance(dataset, RetrievalSet) else composition.TASK


def describe(masking: MaskingConfig) -> str:
    """A masking as it is named in results: strategy and share at the end of training."""
    return f"{masking.strategy} {masking.mask_ratio(1.0):.0%}"


def _select(tasks: str, datasets: Sequence[EvaluationSet]) -> list[EvaluationSet]:
    """The datasets of the wanted tasks. Raises UserError for an unknown task and for one without a dataset."""
    names = [dataset.name for dataset in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"two --data directories have the same name ({', '.join(names)}): results would mix")
    if tasks == "auto":
        return list(datasets)
    wanted = [task.strip() for task in tasks.split(",")]
    for task in wanted:
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}: --tasks takes auto, or a list of {', '.join(TASKS)}")
        if TASKS[task] not in map(task_of, datasets):
            raise UserError(f"no dataset for task {task}: none of the --data directories ({', '.join(names)}) fits")
    return [dataset for dataset in datasets if task_of(dataset) in {TASKS[task] for task in wanted}]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Evaluate a checkpoint: zero-shot classification, retrieval, composition.",
        epilog="example: deepspeed pipeline/evaluate.py --checkpoint runs/demo --data eval/zeroshot eval/retrieval "
        "--output runs/demo/evaluation",
    )
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="run or checkpoint directory")
    parser.add_argument("--data", required=True, nargs="+", metavar="DIR", help="evaluation sets (docs/evaluation.md)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="where results.jsonl grows")
    parser.add_argument(
        "--tasks",
        default="auto",
        help=f"auto (what the directories hold; the default) or a list of {','.join(TASKS)}",
    )
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="per rank (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=_positive,
        default=min(16, len(os.sched_getaffinity(0))),
        metavar="N",
        help="image decoding threads per rank (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="checked to be the one the model was trained with; the checkpoint brings its own",
    )
    parser.add_argument(
        "--mask-images",
        action="store_true",
        help="hide patches as training did, each image by itself; results under a name of their own",
    )
    add_launcher_argument(parser)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    run(main)
