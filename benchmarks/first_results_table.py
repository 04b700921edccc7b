"""Collect what first_results.sh measured: a Markdown table and benchmarks/results/first_results.json.

usage: first_results_table.py OUTPUT_OF_FIRST_RESULTS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from record import record

METRICS = {
    "flickr": ["image_retrieval_recall@1", "text_retrieval_recall@1", "image_retrieval_recall@10"],
    "cifar": ["acc1", "acc5"],
}


def read_run(run: Path) -> dict[str, Any]:
    """Figures of one run at each of its checkpoints, and what it cost."""
    results = [json.loads(line) for line in (run / "evaluation" / "results.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "steps": {str(r["step"]): r["metrics"] for r in sorted(results, key=lambda r: r["step"])},
        "chance": results[0]["chance"],
        "samples_seen": metrics[-1]["samples_seen"],
        "mask_ratio": metrics[-1]["mask_ratio"],
        "tokens_per_sample": (metrics[-1]["image_tokens"] + metrics[-1]["text_tokens"]) / 64,
    }


def table(runs: dict[str, dict[str, Any]], names: list[str]) -> str:
    """One row per run and checkpoint, figures in percent."""
    header = ["masking", "step", *names, "tokens a pair"]
    rows = []
    for name, run in runs.items():
        for step, values in run["steps"].items():
            figures = [f"{100 * values[metric]:.1f}" for metric in names]
            rows.append([name.split("_")[1], step, *figures, f"{run['tokens_per_sample']:.0f}"])
    chance = next(iter(runs.values()))["chance"]
    rows.append(["chance", "", *(f"{100 * chance[metric]:.1f}" for metric in names), ""])
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Print a table for each data set and write the record."""
    output = Path(sys.argv[1])
    figures: dict[str, Any] = {}
    for dataset, names in METRICS.items():
        runs = {f"{dataset}_{s}": read_run(output / "runs" / f"{dataset}_{s}") for s in ("none", "random", "cluster")}
        figures |= runs
        print(f"{dataset}\n\n{table(runs, names)}\n")
    print(record("first_results", figures, "benchmarks/first_results.sh DATA OUTPUT", repeats=1))


if __name__ == "__main__":
    main()
