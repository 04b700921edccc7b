"""Make a report of runs and results: one self-contained HTML page, Markdown, CSV, LaTeX; or collect slices' results.

python pipeline/report.py RESULTS… --output DIR
python pipeline/report.py collect OUTPUT…
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # started as a script, the first entry is pipeline/ itself; imports must be those of the repository root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
from collections.abc import Sequence
from typing import Any

from formats.errors import UserError
from formats.files import path_argument, write_atomically
from formats.pages import render
from formats.programs import run
from pipeline.evaluation.jobs import read_jobs, score_job
from pipeline.evaluation.results import RESULTS_FILE, format_table, write_results
from pipeline.recipe import Recipe
from pipeline.reporting import report_tables as tables
from pipeline.reporting.charts import draw_cost_charts, draw_curves, draw_robustness
from pipeline.reporting.inputs import device_hours_label, read_inputs
from pipeline.reporting.pictures import draw_result_pictures
from pipeline.reporting.report_masks import STRATEGIES, PictureGrid, draw_masks, side_by_side
from pipeline.reporting.tables.overview import training_table
from pipeline.reporting.tables.paper_tables import effective_robustness_table, group_tables
from pipeline.reporting.tables.papers import PUBLISHED_FILE, read_published
from pipeline.reporting.tables.rows import by_recipe
from pipeline.reporting.tables.table import write_table_files
from pipeline.training.observing.run_logger import timestamp


def main(argv: Sequence[str]) -> int:
    """Write report.html and report.md, or collect; returns the exit code. Raises UserError for what is no result."""
    if argv[:1] == ["collect"]:
        return _collect(argv[1:])
    arguments = _parser().parse_args(argv)
    inputs = read_inputs(arguments.results)
    published = read_published(arguments.published)
    recipes = [run.recipe for run in inputs.runs if run.recipe]
    masks = draw_masks(arguments.images, recipes[0] if recipes else Recipe()) if arguments.images else None
    entries = by_recipe(inputs.results, inputs.runs)
    pictures = draw_result_pictures(inputs.outputs)
    robustness = draw_robustness(entries, published)
    effective = effective_robustness_table(entries, published)
    content = {
        "created": timestamp(),
        "sources": [str(path) for path in arguments.results],
        "headline": tables.headline_table(inputs.results, inputs.runs),
        "groups": [
            *group_tables(entries, published, device_hours_label(inputs.runs)),
            *([effective] if effective else []),
        ],
        "datasets": tables.dataset_tables(inputs.results),
        "provenance": tables.provenance_table(inputs.results) if inputs.results else None,
        "training": training_table(inputs.runs),
        "result_charts": [
            *draw_cost_charts(inputs.results, inputs.runs, published),
            *([robustness] if robustness else []),
        ],
        "curves": draw_curves(inputs.runs),
        "galleries": pictures.galleries,
        "confusions": pictures.confusions,
        "picture_notes": pictures.notes,
        "masks": masks,
        "strategies": STRATEGIES,
    }
    print(write_report(arguments.output, content))
    return 0


def _collect(argv: Sequence[str]) -> int:
    """Make results.jsonl of what the slices of evaluation jobs left; all jobs are tried before the first error ends."""
    parser = argparse.ArgumentParser(
        prog="report.py collect", description="Put the slices of evaluation jobs together: features -> results.jsonl."
    )
    parser.add_argument(
        "output", nargs="+", type=path_argument, metavar="OUTPUT", help="the --output of pipeline/evaluate.py"
    )
    failures: list[UserError] = []
    for output in parser.parse_args(argv).output:
        for job in read_jobs(output):
            try:
                results = score_job(job, output)
            except UserError as error:
                failures.append(error)
                continue
            write_results(output, results)
            print(f"{job.model.checkpoint}\n{format_table(results)}\n", flush=True)
        print(f"results in {output / RESULTS_FILE}", flush=True)
    if failures:
        for failure in failures[1:]:
            print(f"error: {failure}", file=sys.stderr)
        raise failures[0]
    return 0


def write_report(directory: Path, content: dict[str, Any]) -> Path:
    """Render the templates into a directory; returns the HTML page, which needs no other file."""
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    confusion_charts = [confusion.chart for confusion in content["confusions"] if confusion.chart]
    for chart in (*content["result_charts"], *content["curves"], *confusion_charts):
        write_atomically(directory / "figures" / f"{chart.name}.svg", chart.light_svg)
    single = [content[name] for name in ("headline", "training", "provenance") if content[name]]
    pairs = [confusion.pairs for confusion in content["confusions"]]
    write_table_files(directory / "tables", [*single, *content["groups"], *content["datasets"], *pairs])
    if content["masks"]:
        _write_strips(directory / "figures", content["masks"])
    write_atomically(directory / "report.md", render("report.md.j2", content))
    page = directory / "report.html"
    write_atomically(page, render("report.html.j2", content))
    return page.resolve()


def _write_strips(directory: Path, grid: PictureGrid) -> None:
    for number, row in enumerate(grid.rows):
        strip = side_by_side([row.original.jpeg, *(picture.jpeg for picture in row.masked)])
        write_atomically(directory / f"masks_{number}.jpg", strip)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py",
        description="Make report.html, report.md and tables/*.csv, *.tex of training runs and evaluation results.",
        epilog="example: python pipeline/report.py runs/demo --output runs/demo/report --images eval/retrieval",
    )
    parser.add_argument(
        "results",
        nargs="+",
        type=path_argument,
        metavar="RESULTS",
        help="run directories (with evaluation/results.jsonl, if evaluated), directories with results.jsonl, or files",
    )
    parser.add_argument(
        "--output", required=True, type=path_argument, metavar="DIR", help="where report.html and report.md go"
    )
    parser.add_argument(
        "--published",
        type=path_argument,
        default=PUBLISHED_FILE,
        metavar="FILE",
        help="figures of papers to show below ours, instead of pipeline/reporting/tables/published.yaml",
    )
    parser.add_argument(
        "--images",
        type=path_argument,
        metavar="SOURCE",
        help="folder, tar or shard directory of images, or evaluation set: show what masking hides on some of them",
    )
    return parser


if __name__ == "__main__":
    run(main)
