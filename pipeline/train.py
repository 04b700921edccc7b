"""Train a CLIP model: `deepspeed pipeline/train.py --recipe NAME section.key=value …`; also torchrun, srun, python."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # a script's own directory comes first on sys.path; the project's packages lie one level up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from formats.programs import add_launcher_argument, run
from pipeline.recipe_files import OPTIONS, RECIPES_DIRECTORY, load_recipe
from pipeline.recipe_options import describe_options


def _parser() -> argparse.ArgumentParser:
    known = ", ".join(sorted(path.stem for path in RECIPES_DIRECTORY.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a cluster-masked CLIP model. A run directory with a checkpoint is continued.",
        epilog=f"recipes: {known}\n\noptions of a recipe, with defaults; S: a stage may change "
        f"it, R: so may a run that is continued:\n{describe_options(OPTIONS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, help="name of a recipe in pipeline/recipes/, or a YAML file")
    parser.add_argument("--deepspeed_config", help="template in ds_configs/ or JSON file; over train.deepspeed_config")
    parser.add_argument("--resume", metavar="auto|never|PATH", help="where to go on from; over train.resume")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="options that override the recipe")
    simulated = parser.add_argument_group(
        "one rank of many, on this machine's CPU, without a run directory (docs/plan.md)"
    )
    simulated.add_argument("--simulate-world", type=int, metavar="N", help="two steps as one rank of N")
    simulated.add_argument("--simulate-rank", type=int, default=0, metavar="R", help="which one (default: %(default)s)")
    simulated.add_argument("--simulate-pairs", type=int, metavar="P", help="compute P pairs of each micro-batch only")
    add_launcher_argument(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Parse, check the recipe, then train; recipe errors appear before anything heavy is imported."""
    options = _parser().parse_intermixed_args(arguments)  # options may stand among the overrides
    overrides = list(options.overrides)
    if options.deepspeed_config:  # an option like any other, so that a resumed run is held to it
        overrides.append(f"train.deepspeed_config={options.deepspeed_config}")
    if options.resume:
        overrides.append(f"train.resume={options.resume}")
    recipe = load_recipe(options.recipe, overrides)
    if options.simulate_world is not None:
        from pipeline.planning.simulated_rank import simulate

        simulate(recipe, options.simulate_rank, options.simulate_world, options.simulate_pairs)
        return 0

    from pipeline.planning.plan_tables import plan_warnings
    from pipeline.ranks import explain_lost_peers, init_ranks
    from pipeline.training.training_run import train

    with explain_lost_peers():
        return train(recipe, init_ranks(), plan_warnings)


if __name__ == "__main__":
    run(main)
