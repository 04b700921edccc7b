"""What a run needs before it is started: memory, communication, time, cost, and whether it fits."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
from collections.abc import Sequence

from formats.errors import UserError
from formats.programs import positive, run, whole
from pipeline.data.captions import CLIP_BPE, load_tokenizer
from pipeline.data.training_data import TrainingData, read_training_data
from pipeline.hardware import ACCELERATORS, INTERCONNECTS, find_accelerator, find_interconnect
from pipeline.planning.plan_tables import describe, to_dict
from pipeline.planning.run_plan import Hardware, plan_run
from pipeline.recipe import Recipe
from pipeline.recipe_files import load_recipe
from pipeline.training.stage_plan import CAPTION_TOKENS


def main(argv: Sequence[str]) -> int:
    """Print the plan; exit code 0 if the run fits, 1 if it does not. Raises UserError for what a run would refuse."""
    options = _parser().parse_intermixed_args(argv)  # overrides may stand among the options
    recipe = load_recipe(options.recipe, options.overrides)
    accelerator = find_accelerator(options.gpu)
    if options.memory:
        accelerator = accelerator.with_memory(options.memory)
    network = find_interconnect(options.interconnect)

    vocab_size, end_token_id = _vocabulary(recipe)
    data = None if options.samples else _read_data(recipe)
    plan = plan_run(
        recipe,
        Hardware(options.gpus, accelerator, network, options.mfu, options.cores_per_gpu),
        data.epochs if data else options.samples,
        min(options.caption_tokens, recipe.context_length),
        vocab_size,
        end_token_id,
    )
    if data:
        for stage in (stage_plan.stage for stage_plan in plan.stages):
            order = data.order(stage.recipe.data, stage.seed)
            data.check_batch(order, stage.own_positions, stage.batches.global_batch_size)
            data.shards_of(stage.recipe.data)
    print(json.dumps(to_dict(plan), indent=2) if options.json else describe(plan), flush=True)
    return 0 if plan.fits else 1


def _read_data(recipe: Recipe) -> TrainingData:
    if not recipe.data.train:
        raise UserError("how many pairs are there? give --samples N, or data.train=SHARD_DIRECTORY with a manifest")
    return read_training_data(recipe.data)


def _vocabulary(recipe: Recipe) -> tuple[int, int]:
    """(size, id of the end token): of the recipe's tokenizer if it is a file, else CLIP's."""
    if recipe.data.tokenizer in ("", CLIP_BPE):
        return 49408, 49407
    encoder = load_tokenizer(recipe.data.tokenizer, recipe.context_length).encoder
    return encoder.vocab_size, encoder.end_token_id


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="plan.py",
        description="What a recipe needs on given hardware: memory by part, communication, time, cost, whether it "
        "fits, and what would do better. Nothing is read but the recipe and, without --samples, the manifest.",
        epilog="example: plan.py --recipe base --gpus 8 --gpu a100 --samples 10970000; formulas: docs/plan.md",
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe in pipeline/recipes/, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that override the recipe")
    parser.add_argument("--gpus", required=True, type=whole, metavar="N", help="GPUs, all nodes together")
    parser.add_argument("--gpu", required=True, help=", ".join(ACCELERATORS))
    parser.add_argument(
        "--interconnect",
        default="ndr",
        help=f"between nodes of 8: {', '.join(INTERCONNECTS)}, or GB/s for each GPU (default: %(default)s)",
    )
    parser.add_argument("--memory", type=positive, metavar="GIB", help="of a GPU, if another than usual")
    parser.add_argument("--samples", type=whole, metavar="N", help="pairs (default: of data.train's manifest)")
    parser.add_argument(
        "--caption-tokens",
        type=positive,
        default=CAPTION_TOKENS,
        metavar="T",
        help="of a caption on average, start and end included (default: %(default)g)",
    )
    parser.add_argument("--mfu", type=_share, help="utilisation to assume, 0 to 1, instead of estimating it")
    parser.add_argument(
        "--cores-per-gpu",
        type=positive,
        metavar="N",
        help="CPU cores for each GPU's loader, which may bind (default: as many as it takes)",
    )
    parser.add_argument("--json", action="store_true", help="plain values instead of a table")
    return parser


def _share(text: str) -> float:
    value = positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be a number up to 1, not {text!r}")
    return value


if __name__ == "__main__":
    run(main)
