"""What the full-size recipes will need, as pipeline/plan.py estimates it: no figure here is measured.

    python benchmarks/full_size_plans.py

Writes results/full_size_plans.json, and its tables into docs/reproduce.md. Published runs are planned with the same
formulas, to see how far to trust them.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from doc_tables import markdown, replace
from record import RESULTS_DIRECTORY, record

from pipeline import plan
from pipeline.hardware import find_accelerator
from pipeline.planning.run_plan import IMAGES_PER_CORE_S, SMALL_IMAGES_PER_CORE_S
from pipeline.reporting.tables.papers import Published, read_published

PAGE = ROOT / "docs/reproduce.md"
TABLES = "full_size_plans.json"


@dataclass(frozen=True)
class Case:
    """A recipe on hardware.

    row: the method, or the system of a cost, of pipeline/reporting/tables/published.yaml that it should reproduce
    started_with: options that it needs when it is started, and no plan does
    """

    recipe: str
    samples: int
    gpus: int
    gpu: str
    shards: str = ""
    row: str = ""
    options: tuple[str, ...] = ()
    started_with: str = ""

    @property
    def arguments(self) -> list[str]:
        """Of pipeline/plan.py."""
        hardware = ["--gpus", str(self.gpus), "--gpu", self.gpu]
        return ["--recipe", self.recipe, *hardware, "--samples", str(self.samples), *self.options]

    @property
    def start(self) -> str:
        """The command that starts it."""
        nodes = -(-self.gpus // find_accelerator(self.gpu).per_node)
        words = " ".join(filter(None, (self.started_with, *(self.options if self.shards else ()))))
        options = f' OPTIONS="{words}"' if " " in words else f" OPTIONS={words}" if words else ""
        return f"RECIPE={self.recipe} SHARDS={self.shards}{options} sbatch --nodes={nodes} slurm/train.sbatch"


# Pairs: of CC12M as in both papers' scripts; of LAION-400M what DynamiCS could still fetch; of DataComp the whole pool.
CC12M, LAION_400M, DATACOMP = 10_968_539, 298_000_000, 128_000_000
# For the stage at 112 pixels, in both recipes that have one: `data-prep reshard --image-size 128`.
SMALL_EDITION = "stages.low.data.train=data/laion400m/shards_128"
CASES = (
    *(
        Case(f"cc12m_vit_b16_{name}", CC12M, 8, "h100", "data/cc12m/shards", row)
        for name, row in (
            ("clip", "CLIP"),
            ("flip", "FLIP"),
            ("cluster", "cluster masking"),
            ("cluster_embedding", ""),
            ("pgs", "CLIP-PGS 0.5"),
        )
    ),
    Case(
        "cc12m_vit_b16_cluster_concepts",
        CC12M,
        8,
        "h100",
        "data/cc12m/shards",
        started_with="concepts.file=data/cc12m/concepts.jsonl",
    ),
    Case(
        "text_mlm_then_clip",
        CC12M,
        8,
        "h100",
        "data/cc12m/shards",
        started_with="concepts.file=data/cc12m/concepts.jsonl",
    ),
    Case("laion400m_vit_b16_cluster", LAION_400M, 64, "h100", "data/laion400m/shards"),
    Case("datacomp_medium_vit_b16_cluster", DATACOMP, 8, "h100", "data/datacomp_medium/shards"),
    Case("efficient_vit_b16", LAION_400M, 8, "h100", "data/laion400m/shards", options=(SMALL_EDITION,)),
    Case(
        "dynamics_vit_b16",
        LAION_400M,
        8,
        "h100",
        "data/laion400m/shards",
        "DynamiCS ViT-B/16",
        options=(SMALL_EDITION,),
        started_with="data.balance=data/laion400m/balance",
    ),
)
# System of the published costs -> the same run in our model: its samples, batches and GPUs, nothing masked.
PUBLISHED_RUNS = {
    "OpenCLIP ViT-B/16": Case(
        "laion400m_vit_b16_cluster",
        LAION_400M,
        176,
        "a100-40gb",
        options=("masking.strategy=none", "train.micro_batch_size=192"),
    ),
    "DynamiCS ViT-B/16": Case("dynamics_vit_b16", LAION_400M, 8, "h100"),
}


def plan_case(case: Case) -> dict[str, Any]:
    """What plan.py says, in short, and GPU-hours if the loader has the cores that slurm/train.sbatch asks for."""
    planned, cores = run_planner(case.arguments), cores_per_gpu()
    fed = run_planner([*case.arguments, "--cores-per-gpu", str(cores)])
    return {
        "command": f"python pipeline/plan.py {' '.join(case.arguments)}",
        "start": case.start if case.shards else "",
        "row": case.row,
        "gpus": case.gpus,
        "gpu": case.gpu,
        "fits": planned["fits"],
        "days": round(planned["days"], 3),
        "gpu_hours": round(planned["gpu_hours"], 1),
        "cores_per_gpu": cores,
        "gpu_hours_with_these_cores": round(fed["gpu_hours"], 1),
        "stages": [short_stage(stage, case.gpus) for stage in planned["stages"]],
    }


def run_planner(arguments: Sequence[str]) -> dict[str, Any]:
    """What `plan.py --json` prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        plan.main([*arguments, "--json"])
    planned: dict[str, Any] = json.loads(printed.getvalue())
    return planned


def short_stage(stage: dict[str, Any], gpus: int) -> dict[str, Any]:
    """What the table shows of a stage."""
    return {
        "name": stage["name"],
        "steps": stage["steps"],
        "samples": stage["samples"],
        "global_batch_size": stage["micro_batch_size"] * stage["accumulation_steps"] * gpus,
        "micro_batch_size": stage["micro_batch_size"],
        "device_bytes": stage["memory"]["device_bytes"],
        "step_s": round(stage["step_s"], 4),
        "images_per_s_per_gpu": round(stage["images_per_s_per_gpu"]),
        "loader_cores_per_gpu": round(stage["loader_cores_per_gpu"], 1),
    }


def cores_per_gpu() -> int:
    """What slurm/train.sbatch asks for."""
    found = re.search(r"^#SBATCH --cpus-per-task=(\d+)$", (ROOT / "slurm/train.sbatch").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def tables(figures: dict[str, Any], published: Published) -> str:
    """Both tables of docs/reproduce.md."""
    return f"{recipe_table(figures['recipes'], published)}\n\n{check_table(figures['published_runs'], published)}"


def recipe_table(recipes: dict[str, Any], published: Published) -> str:
    """A row for each recipe; what stages have of their own is separated by slashes."""
    cores = next(iter(recipes.values()))["cores_per_gpu"]
    header = ["recipe", "on", "samples, M", "batch", "memory, GB", "step, s", "images/s a GPU", "days", "GPU-hours"]
    header += [f"with {cores} cores a GPU", "published row: IN-1K, mean of 17", "start"]
    rows = []
    for name, planned in recipes.items():
        stages = planned["stages"]
        rows.append(
            [
                f"`{name}`",
                f"{planned['gpus']} x {planned['gpu']}",
                slashed(f"{stage['samples'] / 1e6:,.0f}" for stage in stages),
                slashed(f"{stage['global_batch_size']:,}" for stage in stages),
                slashed(f"{stage['device_bytes'] / 1e9:.0f}" for stage in stages),
                slashed(f"{stage['step_s']:.3f}" for stage in stages),
                slashed(f"{stage['images_per_s_per_gpu']:,}" for stage in stages),
                f"{planned['days']:.2f}",
                f"{planned['gpu_hours']:,.0f}",
                f"{planned['gpu_hours_with_these_cores']:,.0f}",
                published_row(planned["row"], published),
                f"`{planned['start']}`",
            ]
        )
    return markdown(header, rows)


def published_row(method: str, published: Published) -> str:
    """A method and its two figures that sum up the most; a system of the costs and what it reached for them."""
    if not method:
        return "none"
    if cost := next((cost for cost in published.costs if cost.system == method), None):
        return f"{method}: {cost.imagenet:.1f}, {cost.gpu_hours:,.0f} GPU-hours"
    imagenet = published.tables["robustness"].figures(method)["imagenet"]
    return f"{method}: {imagenet:.1f}, {published.tables['zero_shot'].figures(method)['mean']:.1f}"


def check_table(runs: dict[str, Any], published: Published) -> str:
    """Published GPU-hours beside the plan of as many samples."""
    costs = {cost.system: cost.gpu_hours for cost in reversed(published.costs)}
    rows = [
        [
            system,
            f"{planned['gpus']} x {planned['gpu']}",
            f"{costs[system]:,.0f}",
            f"{planned['gpu_hours']:,.0f}",
            f"{costs[system] / planned['gpu_hours']:.1f}",
        ]
        for system, planned in runs.items()
    ]
    return markdown(["published run", "planned on", "GPU-hours, published", "planned", "published over planned"], rows)


def slashed(parts: Iterable[str]) -> str:
    """One cell of several stages."""
    return " / ".join(parts)


def plan_all() -> dict[str, Any]:
    """The record's figures."""
    return {
        "images_per_core_s": IMAGES_PER_CORE_S,
        "small_images_per_core_s": SMALL_IMAGES_PER_CORE_S,
        "recipes": {case.recipe: plan_case(case) for case in CASES},
        "published_runs": {system: plan_case(case) for system, case in PUBLISHED_RUNS.items()},
    }


def recorded() -> dict[str, Any]:
    """The figures of the last record."""
    figures: dict[str, Any] = json.loads((RESULTS_DIRECTORY / "full_size_plans.json").read_text())["figures"]
    return figures


def main() -> None:
    """Plan, record, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    figures = plan_all()
    replace(PAGE, TABLES, tables(figures, read_published()))
    print(tables(figures, read_published()))
    print(record("full_size_plans", figures, "python benchmarks/full_size_plans.py", repeats=0))


if __name__ == "__main__":
    main()
