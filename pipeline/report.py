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
from dataclasses import replace
from typing import Any

from formats.errors import UserError
from formats.files import path_argument, write_atomically
from formats.pages import render
from formats.programs import run
from pipeline.evaluation.jobs import Failure, job_files, raise_first, read_job, score_job
from pipeline.evaluation.results import RESULTS_FILE, format_table, write_results
from pipeline.recipe import Recipe
from pipeline.reporting.charts import draw_cost_charts, draw_curves, draw_robustness
from pipeline.reporting.inputs import read_inputs
from pipeline.reporting.masks.drawing import jpeg_bytes
from pipeline.reporting.masks.painter import side_by_side
from pipeline.reporting.masks.setting import make_setting
from pipeline.reporting.masks.sheet import Sheet, load_images, make_sheet
from pipeline.reporting.pictures import draw_result_pictures
from pipeline.reporting.runs import Run, device_hours_label
from pipeline.reporting.tables.overview import (
    dataset_tables,
    headline_table,
    provenance_table,
    rarity_table,
    training_table,
)
from pipeline.reporting.tables.paper_tables import effective_robustness_table, paper_tables
from pipeline.reporting.tables.papers import PUBLISHED_FILE, read_published
from pipeline.reporting.tables.rows import by_recipe
from pipeline.reporting.tables.table import write_table_files
from pipeline.training.observing.run_logger import timestamp

_TEMPLATES = Path(__file__).parent / "reporting" / "templates"
# The report's parts in their order: the name of what is in them, an address on the page, a heading.
_SECTIONS = (
    ("training", "run", "What was run"),
    ("headline", "results", "How it did"),
    ("groups", "papers", "As papers print them"),
    ("datasets", "sets", "All figures by dataset"),
    ("galleries", "retrieval", "Retrieval, looked at"),
    ("confusions", "confusions", "Which classes are taken for which"),
    ("masks", "masks", "What masking hides"),
    ("provenance", "provenance", "Provenance"),
)
_MASKS_SHOWN, _IMAGES_SHOWN, _NAMES_IN_TITLE = ("random", "cluster"), 8, 4


def main(argv: Sequence[str]) -> int:
    """Write report.html and report.md, or collect; returns the exit code. Raises UserError for what is no result."""
    if argv[:1] == ["collect"]:
        return _collect(argv[1:])
    arguments = _parser().parse_args(argv)
    inputs = read_inputs(arguments.results)
    published = read_published(arguments.published)
    masks = _draw_masks(arguments.images, inputs.runs) if arguments.images else None
    entries = by_recipe(inputs.checkpoints)
    pictures = draw_result_pictures(inputs.jobs)
    robustness = draw_robustness(entries, published)
    effective = effective_robustness_table(entries, published)
    by_rarity = rarity_table(inputs.checkpoints, published, inputs.runs)
    content: dict[str, Any] = {
        "title": _title(inputs.runs) or ", ".join(entry.label for entry in entries[:_NAMES_IN_TITLE]),
        "created": timestamp(),
        "sources": [str(path) for path in arguments.results],
        "training": training_table(inputs.runs),
        "curves": draw_curves(inputs.runs),
        "headline": headline_table(inputs.checkpoints, inputs.runs),
        "result_charts": [
            *draw_cost_charts(inputs.checkpoints, inputs.runs, published),
            *([robustness] if robustness else []),
        ],
        "groups": [
            *paper_tables(entries, published, device_hours_label(inputs.runs)),
            *([effective] if effective else []),
            *([by_rarity] if by_rarity else []),
        ],
        "datasets": dataset_tables(inputs.checkpoints),
        "galleries": pictures.galleries,
        "confusions": pictures.confusions,
        "picture_notes": (*inputs.job_notes, *pictures.notes),
        "masks": masks,
        "provenance": provenance_table(inputs.checkpoints),
    }
    content["sections"] = {address: heading for name, address, heading in _SECTIONS if content[name]}
    print(write_report(arguments.output, content))
    return 0


def _title(runs: Sequence[Run]) -> str:
    """What the report is about: the run with its model and masks, or the names of several."""
    if len(runs) == 1 and runs[0].recipe:
        recipe = runs[0].recipe
        masks = recipe.masking.strategy.replace("none", "no")
        return f"{runs[0].name}: {recipe.model.name}, {masks} masking"
    more = len(runs) - _NAMES_IN_TITLE
    return ", ".join(run.name for run in runs[:_NAMES_IN_TITLE]) + (f" and {more} more" if more > 0 else "")


def _draw_masks(source: Path, runs: Sequence[Run]) -> Sheet:
    """What masks hide at the start of the first run that has a recipe, when embeddings have no say yet."""
    recipe = next((run.recipe for run in runs if run.recipe), Recipe())
    pixels_alone = replace(recipe.masking, embedding_mix=0.0)
    setting = make_setting(
        recipe.model_copy(update={"masking": pixels_alone}), _MASKS_SHOWN, None, None, None, seed=0, progress=0.0
    )
    return make_sheet(setting, *load_images(source, _IMAGES_SHOWN, setting.image_size), "masks")


def _collect(argv: Sequence[str]) -> int:
    """Make results.jsonl of what the slices of evaluation jobs left; all jobs are tried before the first error ends."""
    parser = argparse.ArgumentParser(
        prog="report.py collect", description="Put the slices of evaluation jobs together: features -> results.jsonl."
    )
    parser.add_argument(
        "output", nargs="+", type=path_argument, metavar="OUTPUT", help="the --output of pipeline/evaluate.py"
    )
    failures: list[Failure] = []
    for output in parser.parse_args(argv).output:
        files = job_files(output)
        if not files:
            failures.append(UserError(f"nothing to collect in {output}: no slice of an evaluation has ended there"))
        for file in files:
            try:
                job = read_job(file)
                results = score_job(job, output)
            except (UserError, OSError) as error:
                failures.append(error)
                continue
            write_results(output, results)
            print(f"{job.model.checkpoint}\n{format_table(results)}\n", flush=True)
        print(f"results in {output / RESULTS_FILE}", flush=True)
    raise_first(failures)
    return 0


def write_report(directory: Path, content: dict[str, Any]) -> Path:
    """Render the templates into a directory; returns the HTML page, which needs no other file."""
    figures = directory / "figures"
    confusion_charts = [confusion.chart for confusion in content["confusions"] if confusion.chart]
    for chart in (*content["result_charts"], *content["curves"], *confusion_charts):
        write_atomically(figures / f"{chart.name}.svg", chart.light_svg)
    single = [content[name] for name in ("headline", "training", "provenance") if content[name]]
    pairs = [confusion.pairs for confusion in content["confusions"]]
    write_table_files(directory / "tables", [*single, *content["groups"], *content["datasets"], *pairs])
    for number, row in enumerate(content["masks"].rows if content["masks"] else ()):
        strip = side_by_side([cell.picture for cell in row.cells])
        write_atomically(figures / f"masks_{number}.jpg", jpeg_bytes(strip))
    write_atomically(directory / "report.md", render(_TEMPLATES / "report.md.j2", content))
    page = directory / "report.html"
    write_atomically(page, render(_TEMPLATES / "report.html.j2", content))
    return page.resolve()


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
